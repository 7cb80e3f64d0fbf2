"""Embeddings of a real server, which `make test-servers` installs; see the Makefile."""

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import HANG, move_adapter, tiny_config
from peft import get_peft_model
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

from pgn_peft import make_prompter

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [INFINITY, "v2", "--model-id", folder, "--engine", "torch", "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--no-bettertransformer", "--no-model-warmup", "--served-model-name", "clip"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + HANG
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                said = (folder.parent / "log").read_text(encoding="utf-8", errors="replace")
                assert process.poll() is None, said
                assert time.monotonic() < end, said
                time.sleep(0.5)
        yield folder, f"http://127.0.0.1:{port}/embeddings"
    finally:
        process.terminate()
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
