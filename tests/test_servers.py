"""Real servers, which `make test-servers` installs: embeddings of infinity-emb, scores of LitServe."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from adapt_black_box import embedding_of, scores_of
from conftest import HANG, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection, ViTImageProcessor

from pgn_peft import Views, adapt_black_box, make_prompter
from pgn_peft.prompter import Calls
from pgn_peft.prompter.black_box import plan_rungs
from pgn_peft.prompter.calls import encode

INFINITY = os.environ.get("INFINITY")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INFINITY, reason="`make test-servers` sets INFINITY")]

PROCESSOR = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})


def save_clip(folder):
    """A tiny CLIP of random weights, with the files that a server asks for."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower["projection_dim"] = 16
    vision, text = {"image_size": 32, "patch_size": 8}, {"vocab_size": 60, "max_position_embeddings": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=tower | vision, text_config=tower | text, projection_dim=16)).save_pretrained(
        folder
    )
    PROCESSOR.save_pretrained(folder)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}', encoding="utf-8")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP, and the address of a server of it."""
    folder = tmp_path_factory.mktemp("server") / "clip"
    folder.mkdir()
    save_clip(folder)
    command = [INFINITY, "v2", "--model-id", folder, "--engine", "torch", "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--no-bettertransformer", "--no-model-warmup", "--served-model-name", "clip", "--port"]
    with running(command, folder.parent / "log") as url:
        yield folder, f"{url}/embeddings"


@contextmanager
def running(command, log):
    """Run a server whose last argument is its port; yield its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), str(port)], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        end = time.monotonic() + HANG
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                said = log.read_text(encoding="utf-8", errors="replace")
                assert process.poll() is None, said
                assert time.monotonic() < end, said
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # LitServe has workers of its own, which would outlive it
        process.wait()


def embed(url, images):
    """Ask for the embeddings of images in OpenAI's format."""
    urls = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    content = json.dumps({"model": "clip", "input": urls, "modality": "image"}).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        data = json.load(response)["data"]
    return torch.tensor([entry["embedding"] for entry in sorted(data, key=lambda entry: entry["index"])])


def test_a_real_server_gives_prompted_images_the_embeddings_of_the_adapted_model(clip):
    folder, url = clip
    mean, std = list(PROCESSOR.image_mean), list(PROCESSOR.image_std)
    config = tiny_config(prompt_space="pixel", image_mean=mean, image_std=std, num_virtual_tokens=None)
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    model = move_adapter(get_peft_model(model, config)).eval()
    prompter = make_prompter(model, PROCESSOR)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8)) for n in range(5)]

    found = embed(url, prompter(images))

    with torch.no_grad():
        local = model(PROCESSOR(images=images, return_tensors="pt")["pixel_values"]).image_embeds
        with model.disable_adapter():
            plain = model(PROCESSOR(images=prompter(images), return_tensors="pt")["pixel_values"]).image_embeds
    plain, local = (torch.nn.functional.normalize(embeds, dim=-1) for embeds in (plain, local))
    print(f"largest difference of an embedding: {(found - plain).abs().max():.1e}")
    assert (found - plain).abs().max() < 1e-5
    # A pixel between two levels may be rounded up here and down there.
    assert (found - local).abs().max() < 1e-2
    texts = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    prompter.use_texts(texts, {0: "river", 1: "forest", 2: "sea"})
    expected = 100 * plain @ torch.nn.functional.normalize(texts, dim=-1).mT
    assert (prompter.classify(found) - expected).abs().max() < 1e-3


def coloured(number):
    """Images of two classes, which differ in hue; and their labels."""
    random = np.random.default_rng(0)
    labels = [index % 2 for index in range(number)]
    hues = [np.array([(150, 100, 100), (100, 100, 150)][label]) for label in labels]
    pixels = [(hue + random.integers(-30, 31, size=(40, 50, 3))).astype(np.uint8) for hue in hues]
    return [Image.fromarray(each) for each in pixels], labels


def check_adaptation(call, cache):
    """Adapt by calls, read other images from the saved result, and run once more without a call."""
    (images, labels), names = coloured(40), ["red", "blue"]
    found = adapt_black_box(images[:30], labels[:30], Calls(call, cache), names, image_size=32)
    assert found.calls <= plan_rungs(22, 30, 2).calls
    found.views.save_pretrained(cache.parent / "views")
    views = Views.from_pretrained(cache.parent / "views")
    answers = [[call(encode(view)) for view in views(image)] for image in images[30:]]
    assert [views.read_answers(each)[0]["label"] for each in answers] == [names[label] for label in labels[30:]]
    again = adapt_black_box(images[:30], labels[:30], Calls(call, cache), names, image_size=32)
    assert (again.calls, again.names) == (0, found.names)


def test_an_embedding_server_is_adapted_by_calls_alone(clip, tmp_path):
    check_adaptation(embedding_of(clip[1], "clip"), tmp_path / "answers.sqlite")


def test_litserve_is_adapted_by_calls_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tiny_vit(num_labels=20).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    command = [Path(INFINITY).with_name("python"), Path(__file__).with_name("lit_server.py"), tmp_path / "vit"]
    with running(command, tmp_path / "log") as url:
        check_adaptation(scores_of(f"{url}/predict", 20), tmp_path / "answers.sqlite")
