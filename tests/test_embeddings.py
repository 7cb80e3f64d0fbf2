"""Services that return embeddings: their client, and the heads that classify what they return."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import assert_same, tiny_config, tiny_vit
from peft import get_peft_model
from PIL import Image
from transformers import ViTImageProcessor

from pgn_peft import ImagePrompter, make_prompter
from pgn_peft.prompter import EmbeddingsClient

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def photos(number=5):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (9, 7 + n, 3), dtype=np.uint8)) for n in range(number)]


@contextmanager
def service(change=lambda answer: answer, status=200):
    """A service in OpenAI's format, whose embedding of an image is its width and its mean; yields URL and requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            data = []
            for index, url in enumerate(body["input"]):
                image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
                data.append({"index": index, "embedding": [image.width, float(np.mean(np.asarray(image)))]})
            payload = json.dumps(change({"data": data[::-1]})).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self):
            requests.append((self.path, dict(self.headers), None))
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/embeddings", requests
    finally:
        server.shutdown()
        server.server_close()


def test_images_arrive_unchanged_in_batches_and_embeddings_return_in_order():
    images = photos()
    with service() as (url, requests):
        found = EmbeddingsClient(url, "clip", api_key="secret", batch_size=2)(images)
        one = EmbeddingsClient(url, "clip")(images[0])
    expected = torch.tensor([[image.width, np.asarray(image).mean()] for image in images])
    assert torch.allclose(found, expected.float())
    assert torch.allclose(one, expected[:1].float())
    assert [len(body["input"]) for _, _, body in requests] == [2, 2, 1, 1]
    _, headers, body = requests[0]
    assert (body["model"], body["modality"], headers["Authorization"]) == ("clip", "image", "Bearer secret")
    assert "Authorization" not in requests[-1][1]


def test_the_key_is_not_sent_to_where_a_service_redirects():
    with service(status=302) as (url, requests), pytest.raises(OSError, match="HTTP 404"):
        EmbeddingsClient(url, "clip", api_key="secret")(photos(1))
    assert [path for path, _, _ in requests] == ["/embeddings", "/elsewhere"]
    assert "Authorization" not in requests[1][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: {"error": "busy"}, "must answer with one embedding for each of 2 images, but got .*busy"),
        (lambda answer: {"data": answer["data"][:1]}, "one embedding for each of 2 images"),
        (
            lambda answer: {"data": answer["data"] + [{"index": 7, "embedding": [1, 2]}]},
            "finite numbers for each of 2",
        ),
        (lambda answer: {"data": [{"index": n, "embedding": [float("nan")]} for n in range(2)]}, "finite numbers"),
        (lambda answer: {"data": [{"index": n, "embedding": [1.0] * (n + 1)} for n in range(2)]}, "one embedding for"),
        (lambda answer: [1, 2], "one embedding for each of 2 images"),
    ],
)
def test_other_answers_are_refused(change, message):
    with service(change) as (url, _), pytest.raises(ValueError, match=message):
        EmbeddingsClient(url, "clip")(photos(2))


def test_errors_of_the_service_are_passed_on():
    said = "but got HTTP 400: .*image is too small.*Check the name of the model"
    with service(lambda answer: {"error": "image is too small"}, 400) as (url, _), pytest.raises(OSError, match=said):
        EmbeddingsClient(url, "clip")(photos(1))
    with pytest.raises(OSError, match="must be reachable, but got"):
        EmbeddingsClient(url, "clip")(photos(1))
    with pytest.raises(ValueError, match="`url` must start with https:// or http://, but got 'file:///etc/passwd'"):
        EmbeddingsClient("file:///etc/passwd", "clip")
    with pytest.raises(ValueError, match="`images` must be one image at least, but got none"):
        EmbeddingsClient(url, "clip")([])


@pytest.fixture
def prompter():
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    return make_prompter(
        get_peft_model(tiny_vit("CLIPVisionModelWithProjection", projection_dim=6), config), processor
    )


def test_texts_classify_embeddings_by_their_cosines(prompter, tmp_path):
    texts = torch.eye(2, 6) * torch.tensor([[3.0], [0.5]])
    prompter.use_texts(texts, {0: "river", 1: "forest"}, logit_scale=10.0)
    embeddings = torch.tensor([[3.0, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2]])
    assert torch.allclose(prompter.classify(embeddings), torch.tensor([[6.0, 8.0], [0, 0]]))
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert_same(loaded.classify(embeddings), prompter.classify(embeddings))
    assert loaded.id2label == {0: "river", 1: "forest"}
    with pytest.raises(ValueError, match="`id2label` must name the 2 classes of `text_embeds`, but got 1"):
        prompter.use_texts(texts, {0: "river"})


def test_a_head_is_fitted_to_embeddings_of_any_length(prompter):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(200, 6, generator=generator)
    labels = (embeddings[:, 1] > embeddings[:, 2]).long()
    with pytest.raises(ValueError, match="`id2label` must name the task's classes, but got None"):
        prompter.fit_embeddings(embeddings, labels)
    prompter.id2label = {0: "river", 1: "forest"}
    assert prompter.fit_embeddings(embeddings, labels) > 0.95
    assert (prompter.classify(embeddings).argmax(1) == labels).double().mean() > 0.95
    assert torch.allclose(prompter.classify(7 * embeddings), prompter.classify(embeddings), atol=1e-4)
