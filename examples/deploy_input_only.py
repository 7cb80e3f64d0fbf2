"""Adapt a hosted model through its input alone: a stock pipeline behind HTTP, a client that sends prompted PNGs.

Train the client's half first, on an open copy of the model; it is the folder `prompter` in the output folder:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --prompt_space pixel --output_dir outputs/my-adapter
    python examples/deploy_input_only.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --prompter outputs/my-adapter/prompter

The second command starts `pipeline("image-classification")` of the unmodified model in a process of its own, behind
HTTP on this machine, as an endpoint would run it. The client knows only an address: it sends a probe to check that
images arrive unchanged and that the scores that return are enough, and then test images, as they are and prompted,
through `huggingface_hub.InferenceClient`. With `--url` it calls a server that is already running.

The adapter's own head is computed from the scores of all the server's classes. Where these are too few, or have too
few digits, `--fit_images 300` fits a head to the server's answers to prompted training images instead; `--top_k 5`
asks the server for 5 scores only. `--smoke` trains a tiny model and does all this offline, in seconds.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import train_image_classifier
from huggingface_hub import InferenceClient
from image_data import DataArguments, load_splits, smoke_arguments
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageClassification, pipeline

from pgn_peft import ImagePrompter


def serve(model_name_or_path: str) -> None:
    """Answer images with the stock pipeline's scores; print the port first."""
    classify = pipeline("image-classification", model=model_name_or_path)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer an image, alone or in base64 beside parameters, as Inference Endpoints take it."""
            try:
                body, parameters = self.rfile.read(int(self.headers["Content-Length"])), {}
                if self.headers.get_content_type() == "application/json":
                    request = json.loads(body)
                    body, parameters = base64.b64decode(request["inputs"]), request.get("parameters", {})
                answer, status = classify(Image.open(io.BytesIO(body)).convert("RGB"), **parameters), 200
            except Exception as error:  # whatever a client sends, the server goes on
                answer, status = {"error": f"{type(error).__name__}: {error}"}, 400
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Say nothing about each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def hosted(model_name_or_path: str):
    """Run `serve` in a process of its own, and yield its address."""
    command = [sys.executable, __file__, "--serve", model_name_or_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise SystemExit("The server did not start; it says why above.")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def as_png(image: Image.Image) -> bytes:
    """Encode an image without loss: JPEG would change the prompts."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@torch.inference_mode()
def classify_locally(prompter: ImagePrompter, local: torch.nn.Module, image: Image.Image) -> str:
    """Classify a prompted image by the model at hand."""
    scores = local(prompter.pixel_values(image)).logits[0].softmax(-1)
    answer = [{"label": local.config.id2label[index], "score": score} for index, score in enumerate(scores.tolist())]
    return prompter.read_answer(answer)[0]["label"]


def call(
    url: str, prompter: ImagePrompter, rows, local: torch.nn.Module, top_k: int | None, to_fit
) -> dict[str, float]:
    """Send test images to the server, as they are and prompted, and compare with the model at hand."""
    client = InferenceClient(model=url)
    top_k = len(prompter.server_labels) if top_k is None else top_k
    answer = client.image_classification(as_png(prompter.probe()), top_k=top_k)
    difference = prompter.check_server(answer)
    print(f"the server sees what it is sent: its scores for the probe differ by {difference:.1e} of the largest")
    if len(to_fit):
        images = tqdm(to_fit["image"], total=len(to_fit), leave=False)
        answers = [client.image_classification(as_png(prompter(image)), top_k=top_k) for image in images]
        accuracy = prompter.fit_answers(answers, to_fit["label"])
        print(f"a head fitted to {len(answers)} answers ({prompter.score_head.report.kind}): {accuracy:.3f} held out")
    names = rows.features["label"].names
    correct = {"as they are": 0, "prompted": 0}
    agreement, added_bytes, added_seconds = 0, 0, 0.0
    for image, label in tqdm(zip(rows["image"], rows["label"], strict=True), total=len(rows), leave=False):
        start = time.perf_counter()
        prompted = prompter(image)
        added_seconds += time.perf_counter() - start
        files = {"as they are": as_png(image), "prompted": as_png(prompted)}
        added_bytes += len(files["prompted"]) - len(files["as they are"])
        answers = {}
        for kind, file in files.items():
            answers[kind] = prompter.read_answer(client.image_classification(file, top_k=top_k))[0]["label"]
            correct[kind] += answers[kind] == names[label]
        agreement += classify_locally(prompter, local, image) == answers["prompted"]
    number = len(rows)
    return {
        "accuracy as they are": correct["as they are"] / number,
        "agreement with the model at hand": agreement / number,
        "bytes added per image": added_bytes / number,
        "milliseconds added per image": 1000 * added_seconds / number,
        "accuracy prompted": correct["prompted"] / number,
    }


def main(command_line: list[str] | None = None) -> dict[str, float] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="the server's model")
    parser.add_argument("--prompter", help="folder or id of an ImagePrompter")
    parser.add_argument("--dataset", help="images to classify: its test split, or else validation")
    parser.add_argument("--max_images", type=int, default=200)
    parser.add_argument("--top_k", type=int, help="scores to ask the server for; by default all")
    parser.add_argument("--fit_images", type=int, default=0, help="training images to fit a head to the answers to")
    parser.add_argument("--url", help="of a server; by default one is started")
    parser.add_argument("--serve", metavar="MODEL", help="be the server of this model, until interrupted")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    if options.serve:
        serve(options.serve)
        return None
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            train_smoke(Path(folder), options)
        if not (options.model_name_or_path and options.prompter and options.dataset):
            parser.error("--model_name_or_path, --prompter and --dataset are required")
        prompter = ImagePrompter.from_pretrained(options.prompter)
        splits = load_splits(DataArguments(options.dataset), seed=0)
        rows = splits["test" if "test" in splits else "validation"]
        rows = rows.shuffle(seed=0).select(range(min(options.max_images, len(rows))))
        local = AutoModelForImageClassification.from_pretrained(options.model_name_or_path).eval()
        to_fit = splits["train"].shuffle(seed=0).select(range(min(options.fit_images, len(splits["train"]))))
        with nullcontext(options.url) if options.url else hosted(options.model_name_or_path) as url:
            figures = call(url, prompter, rows, local, options.top_k, to_fit)
    for name, value in figures.items():
        print(name, f"{value:.0f}" if "bytes" in name else f"{value:.1f}" if "milli" in name else f"{value:.3f}")
    return figures


def train_smoke(folder: Path, options: argparse.Namespace) -> None:
    """Train a tiny adapter in pixel space with the training script, and fill in the options."""
    more = "--prompt_space pixel --head frozen --label_mapping true --num_virtual_tokens 16 --learning_rate 0.03"
    train_image_classifier.main([*smoke_arguments(folder), *more.split(), "--num_train_epochs", "6"])
    options.model_name_or_path, options.dataset = str(folder / "vit"), str(folder / "images")
    options.prompter = str(folder / "adapter/prompter")


if __name__ == "__main__":
    main()
