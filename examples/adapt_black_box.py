"""Adapt a hosted model by calls alone: no open copy of it, no gradient.

    python examples/adapt_black_box.py --server http://localhost:8000 --dataset path/to/images \
        --output_dir outputs/my-views

The server takes images as Inference Endpoints take them, and answers with labels and scores; with `--embeddings MODEL`
it is called in OpenAI's format, as infinity-emb takes it, and answers with embeddings. Several ways of sending the
training images are tried: as they are, with colours added, with other contrasts, with random tiles added, mirrored.
Cross-validation chooses which of them to send, one or several for each image, and a head is fitted to the answers.

The number of calls is printed before the first one. Answers are kept in `answers.sqlite` in the output folder, so an
interrupted run continues where it ended. The result is saved there too, with a model card; test images are classified
once, at the end.

With `--open_copy MODEL`, prompts are also trained on an open copy of the server's model, one change for all patches
("tile") and one for each ("additive"). Both start from the best way found. They are used only if they are better on
the validation images. `--smoke` does all this offline with a tiny model, in seconds.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import List
from deploy_input_only import hosted
from huggingface_hub import InferenceClient
from image_data import DataArguments, class_names, divide, load_processor, load_splits, smoke_arguments
from peft import get_peft_model
from transformers import AutoModelForImageClassification

from pgn_peft import ImagePrompter, PGNConfig, make_prompter
from pgn_peft.nn.images import to_pixels
from pgn_peft.nn.preprocessing import normalize
from pgn_peft.prompter import NOTHING, Calls, Views, adapt_black_box, make_candidates
from pgn_peft.prompter.black_box import Adaptation, plan_rungs
from pgn_peft.training import parameter_groups
from pgn_peft.tuner.layer import PGNLayer

FORMS = {"tile": "static", "additive": "resnet10"}  # generators of the trained forms


def scores_of(url: str, top_k: int) -> Callable[[bytes], Any]:
    """Return a call that asks an endpoint for labels and scores."""
    client = InferenceClient(model=url)
    return lambda file: client.image_classification(file, top_k=top_k)


def embedding_of(url: str, model: str) -> Callable[[bytes], Any]:
    """Return a call that asks for an embedding in OpenAI's format."""

    def call(file: bytes) -> list[float]:
        kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
        address = f"data:image/{kind};base64," + base64.b64encode(file).decode()
        content = json.dumps({"model": model, "input": [address], "modality": "image"}).encode()
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["data"][0]["embedding"]

    return call


def classify(views: Views, calls: Calls, rows: Any) -> np.ndarray:
    """Return for each image whether it is classified right, as 0 or 1."""
    answers = zip(*[calls.answers(images, "evaluation") for images in views(list(rows["image"]))], strict=True)
    found = [views.read_answers(each)[0]["label"] for each in answers]
    names = class_names(rows)
    return np.array([label == names[true] for label, true in zip(found, rows["label"], strict=True)], dtype=float)


def compare(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return how much more often `other` is right on the same images, and the standard error of that."""
    gain = other - one
    return float(gain.mean()), float(gain.std() / len(gain) ** 0.5)


def fit(prompter: ImagePrompter, calls: Calls, rows: Any) -> Views:
    """Fit a head to the answers to images that are sent in one way."""
    prompter.id2label = dict(enumerate(class_names(rows)))
    views = Views([prompter])
    views.fit_answers([calls.answers(each, "training images") for each in views(list(rows["image"]))], rows["label"])
    return views


def train(form: str, start: ImagePrompter, rows: Any, options: argparse.Namespace) -> ImagePrompter:
    """Train prompts on the open copy, on images that are adjusted as `start` says; they start from its change."""
    torch.manual_seed(0)
    processor = load_processor(options.open_copy, options.image_size)
    scale = (processor.image_mean, processor.image_std)
    config = PGNConfig(
        prompt_space="pixel",
        generator=FORMS[form],
        image_mean=list(scale[0]),
        image_std=list(scale[1]),
        id2label=dict(enumerate(class_names(rows))),
    )
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(options.open_copy), config)
    layer = next(module for module in model.modules() if isinstance(module, PGNLayer))
    # The shift of a patch's token by a change of its pixels: its projection.
    change = start.library[0] / torch.tensor(scale[1])[:, None, None]
    side = layer.projection.kernel_size[0]
    if change.shape[-1] != side:  # a colour fits patches of any size
        change = change[:, :1, :1].expand(-1, side, side)
    with torch.no_grad():
        layer.library("default").token_shifts += (layer.projection.weight * change).sum(dim=(1, 2, 3))
    steps = make_prompter(model, processor).preprocessing
    pixels = torch.stack([steps.apply(to_pixels(image, 3)) for image in rows["image"]])
    labels = torch.tensor(rows["label"])
    optimizer = torch.optim.AdamW(parameter_groups(model, options.learning_rate))
    model.train()
    for epoch in range(options.epochs):
        for chosen in torch.randperm(len(labels)).split(options.batch_size):
            images = start.adjustment.apply(pixels[chosen].float() / 255)
            loss = model(pixel_values=normalize(images, *scale), labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"  {form}, epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}")
    prompter = make_prompter(model.eval(), processor)
    prompter.adjustment = start.adjustment
    return prompter


def improve(found: Adaptation, calls: Calls, splits: Any, options: argparse.Namespace) -> Views:
    """Train both forms from the first view, and return the best of all on the validation images."""
    best, right = found.views, classify(found.views, calls, splits["validation"])
    for form in FORMS:
        trained = fit(train(form, found.views.prompters[0], splits["train"], options), calls, splits["train"])
        result = classify(trained, calls, splits["validation"])
        gain, error = compare(right, result)
        verdict = "better: it is used" if gain > error else "not better by more than noise: it is not used"
        print(f"{form}, trained: {result.mean():.3f} on validation, {gain:+.3f} ± {error:.3f}: {verdict}")
        if gain > error:
            best, right = trained, result
    return best


def print_table(found: Adaptation) -> None:
    """Print what was tried; an accuracy is cross-validated on the training images."""
    print(f"{'images':>6}  {'accuracy':<15}  sent")
    for trial in found.trials:
        chosen = "  <- chosen" if trial.names == found.names and trial is final(found.trials, trial.names) else ""
        accuracy = f"{trial.accuracy:.3f} ± {trial.standard_error:.3f}"
        print(f"{trial.images:>6}  {accuracy:<15}  {' + '.join(trial.names)}{chosen}")


def final(trials: Sequence[Any], names: tuple[str, ...]) -> Any:
    """Return the last trial of these candidates."""
    return [trial for trial in trials if trial.names == names][-1]


def run(call: Callable[[bytes], Any], options: argparse.Namespace) -> dict[str, float]:
    """Adapt, save and evaluate."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_splits(DataArguments(options.dataset, max_train_samples=options.max_train_samples))
    if isinstance(splits["train"].features["label"], List) or len(class_names(splits["train"])) < 2:
        raise SystemExit("Each image must have one class, of two or more.")  # before any call is paid for
    if "test" not in splits:
        splits["validation"], splits["test"] = divide(splits["validation"], 0.5, seed=0)
    for split in ("validation", "test"):
        limit = min(options.max_test_samples, len(splits[split]))
        splits[split] = splits[split].shuffle(seed=0).select(range(limit))
    rows, names, number = splits["train"], class_names(splits["train"]), len(splits["train"])
    candidates = make_candidates(options.image_size)
    planned = plan_rungs(len(candidates), number, len(names), options.budget).calls
    later = len(splits["test"]) * (options.max_views + 1)
    if options.open_copy:
        later += len(FORMS) * (number + len(splits["validation"])) + options.max_views * len(splits["validation"])
    cost = f", which cost {options.price * (planned + later):,.2f} at most" if options.price else ""
    print(f"at most {planned:,} calls for {number} training images, then {later:,} to evaluate{cost}", flush=True)
    asked = f"{options.server} {options.embeddings} {options.top_k}"
    calls = Calls(call, folder / "answers.sqlite", options.jpeg_quality, options.workers, server=asked)
    size, views_at_most = options.image_size, options.max_views
    found = adapt_black_box(
        rows["image"], rows["label"], calls, names, size, candidates, views_at_most, options.budget
    )
    print_table(found)
    print(f"{found.calls:,} calls were made; cached answers do not count")
    views = improve(found, calls, splits, options) if options.open_copy else found.views
    views.save_pretrained(folder)
    views.make_card(folder.name).save(folder / "README.md")
    if options.onnx:
        views.export_onnx(folder)
    alone = classify(fit(candidates[NOTHING], calls, rows), calls, splits["test"])
    adapted = classify(views, calls, splits["test"])
    gain, error = compare(alone, adapted)
    print(f"saved in {folder}: {len(views.prompters)} calls for each image; {calls.made:,} calls in all")
    print(f"test: a head alone {alone.mean():.3f}, this {gain:+.3f} ± {error:.3f}")
    print(f"test accuracy {adapted.mean():.3f}")
    return {"alone": float(alone.mean()), "accuracy": float(adapted.mean()), "calls": calls.made}


def make_smoke(folder: Path, options: argparse.Namespace) -> str:
    """Set the options to a tiny model and generated images; return the model's path."""
    smoke_arguments(folder)
    model = str(folder / "vit")
    options.dataset, options.output_dir, options.open_copy = str(folder / "images"), str(folder / "views"), model
    options.image_size, options.max_train_samples, options.max_test_samples, options.epochs = 32, 16, 8, 1
    return model


def main(command_line: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a server")
    parser.add_argument("--dataset", help="a folder of images or of parquet files, or an id on the Hub")
    parser.add_argument("--output_dir", help="folder for the result and for the server's answers")
    parser.add_argument("--embeddings", metavar="MODEL", help="ask for embeddings of this model, in OpenAI's format")
    parser.add_argument("--top_k", type=int, default=10_000, help="scores to ask for; by default all")
    parser.add_argument("--image_size", type=int, default=224, help="side of the images to send: the server's own")
    parser.add_argument("--jpeg_quality", type=int, help="send JPEG files; by default PNG")
    parser.add_argument("--max_train_samples", type=int, default=500)
    parser.add_argument("--max_test_samples", type=int, default=500, help="also of validation images")
    parser.add_argument("--budget", type=float, default=20, help="most calls for each training image")
    parser.add_argument("--max_views", type=int, default=4, help="most calls for each image that is classified")
    parser.add_argument("--price", type=float, help="of one call, to print the cost")
    parser.add_argument("--workers", type=int, default=8, help="calls at the same time")
    parser.add_argument("--onnx", action="store_true", help="also write an ONNX file for each view")
    parser.add_argument("--open_copy", metavar="MODEL", help="id or path of the server's model, to train prompts on")
    parser.add_argument("--epochs", type=int, default=6, help="on the open copy")
    parser.add_argument("--batch_size", type=int, default=16, help="on the open copy")
    parser.add_argument("--learning_rate", type=float, default=0.001, help="on the open copy")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        model = make_smoke(Path(folder), options) if options.smoke else None
        if not (options.dataset and options.output_dir and (options.server or model)):
            parser.error("--server, --dataset and --output_dir are required")
        if not (model or options.server.startswith("http")):
            parser.error(f"--server {options.server} is no address, such as http://localhost:8000")
        with hosted(model) if model else nullcontext(options.server) as url:
            if options.embeddings:
                return run(embedding_of(url, options.embeddings), options)
            return run(scores_of(url, options.top_k), options)


if __name__ == "__main__":
    main()
