"""Methods that adapt a frozen model through its input image alone, compared on 8-bit PNGs and JPEGs.

    python benchmarks/input_only.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100 \
        path/to/flowers17 digits
    python benchmarks/report.py --results outputs/input_only.jsonl

The server is a stock `ViTForImageClassification` with its own image processor and head. It answers with the scores of
all its classes, off which the task's classes are read in two ways (`heads.py`): by a linear head on the features,
trained together with the prompts, and computed from the scores ("trained"); and by a linear map of all scores that is
fitted to the answers to the prompted training images ("ridge").

Prompts (`--methods`):

- none: the images as they are. This is the baseline that prompts must beat;
- border (VP), smm (SMM), lor-vp (LoR-VP): see `pixel_methods.py`;
- static, pgn: PGN, prompts added to the patches of the image: one for all of them, or generated for each;
- pgn-jpeg: half of the prompted images go through JPEG of quality 90 in training;
- latent-static, latent-pgn: prompts as tokens, which no image can hold: an upper bound, with heads on features.

All methods see the same images, flips (not of digits), batches, epochs and schedule. Each has two learning rates; one
is chosen by the accuracy on validation with seed 0. A generator's are searched, while its library learns at
`--library_rate`, and a head beside prompts at 0.003. Then other seeds are trained, and evaluated once on test: as
trained, as PNG, and as JPEG of quality 90 and 95, each encoded, decoded, and sent through the processor to a model
that was loaded anew. Training computes in bfloat16 by autocast, evaluation in float32.

Every run is appended to a file of JSON lines, and one that is in it is not repeated. `--smoke`: tiny, offline, in
seconds.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import heads
import report
import torch
from peft import get_peft_model
from PIL import Image
from pixel_methods import PEERS, PixelPrompt
from torch import Tensor, nn
from transformers import set_seed

from pgn_peft import PGNConfig, make_prompter
from pgn_peft.nn.images import to_8_bit, to_images
from pgn_peft.nn.preprocessing import normalize
from pgn_peft.training import parameter_groups

# PGN's forms: fields of the config, and two rates of the generator (of the prompts, where there is none).
PGN_METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "static": ({"generator": "static", "prompt_space": "pixel"}, (0.03, 0.1)),
    "pgn": ({"prompt_space": "pixel"}, (0.003, 0.0005)),
    "pgn-jpeg": ({"prompt_space": "pixel", "jpeg_quality": 90}, (0.003, 0.0005)),
    "latent-static": ({"generator": "static"}, (0.003, 0.01)),
    "latent-pgn": ({}, (0.003, 0.0005)),
}
METHODS = ("none", *PEERS, *PGN_METHODS)
HEAD = "trained"
HEAD_RATES = (0.003, 0.01)  # of a linear head without prompts
HEAD_RATE = 0.003  # of a head beside prompts
# What all runs of a table have in common, beside the model.
PROTOCOL = (
    *("side", "epochs", "batch", "precision", "library_size", "library_rate", "generator_image_size"),
    *("max_train_samples", "max_test_samples"),
)
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpeg90": {"format": "JPEG", "quality": 90},
    "jpeg95": {"format": "JPEG", "quality": 95},
}


class Adapted(nn.Module):
    """A server and the prompts that change its images: pixels (B, C, H, W) in [0, 1] to features (B, D).

    Args:
        server: frozen; with PGN its model holds the adapter.
        scale: mean and standard deviation of its processor.
        prompt: a peer's change of the image; None: no prompts, or PGN's.
    """

    def __init__(self, server: heads.Server, scale: Any, prompt: PixelPrompt | None = None) -> None:
        super().__init__()
        self.server, self.scale, self.prompt = server, scale, prompt

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer images with features."""
        if self.prompt is not None:
            pixels = self.prompt.prompted(pixels)
        return self.server.features(normalize(pixels, *self.scale))

    def groups(self, learning_rate: float, library_rate: float) -> list[dict[str, Any]]:
        """Return what is trained: prompts or their generator at the given rate, its library at its own."""
        if self.prompt is not None:
            return [{"params": list(self.prompt.parameters()), "lr": learning_rate}]
        generated = any(".pgn_generator." in name for name, each in self.named_parameters() if each.requires_grad)
        own = library_rate if generated else learning_rate
        return parameter_groups(self.server.model, learning_rate, library_learning_rate=own)


def build(method: str, server: heads.Server, material: bench.Material, options: Any) -> Adapted:
    """Give a server prompts."""
    if method == "none":
        return Adapted(server, material.scale)
    if method in PEERS:
        return Adapted(server, material.scale, PEERS[method][0](options.side, material.scale)).to(bench.DEVICE)
    fields, _ = PGN_METHODS[method]
    mean, std = map(list, material.scale)
    common = {"library_size": options.library_size, "generator_image_size": options.generator_image_size}
    config = PGNConfig(head="frozen", image_mean=mean, image_std=std, **(common | fields))
    server.model = get_peft_model(server.model, config)
    return Adapted(server, material.scale)


def features_of(model: Adapted, split: bench.Split) -> Tensor:
    """Return the features (N, D) of a split, computed in float32."""
    return bench.predict(model, split.pixels).clone()  # a tensor that may take part in training


def load_material(options: Any) -> bench.Material:
    """Return the images of a run."""
    return bench.load_material(
        options.data, options.model, options.side, options.max_train_samples, options.max_test_samples
    )


def run(method: str, learning_rate: float, seed: int, split: str, options: Any) -> dict[str, Any]:
    """Train one model, and evaluate it on a split; where that is test, also as PNG and as JPEG."""
    set_seed(seed)
    material = load_material(options)
    server = heads.load_server(options.model, options.side)
    count = len(material.names)
    head = heads.Trained(server, count)
    model = build(method, server, material, options)
    own = {"params": list(head.parameters()), "lr": learning_rate if method == "none" else HEAD_RATE}
    groups = [own] if method == "none" else [*model.groups(learning_rate, options.library_rate), own]
    start = time.perf_counter()
    train = material.splits["train"]
    loss = bench.train(
        nn.Sequential(model, head),
        train,
        groups,
        epochs=options.epochs,
        batch_size=options.batch,
        flip=not options.data.endswith(bench.NOT_FLIPPED),
        precision=options.precision,
    )
    seconds = time.perf_counter() - start
    features, labels = features_of(model, material.splits[split]), material.splits[split].labels
    ridge = heads.Ridge(server, features_of(model, train), train.labels, count)
    readouts = {HEAD: head, "ridge": ridge}
    with torch.no_grad():
        trained = {name: readout(features) for name, readout in readouts.items()}
    row = {
        "train_loss_last_epoch": loss,
        "train_seconds": round(seconds, 1),
        "trainable_parameters": sum(parameter.numel() for group in groups for parameter in group["params"]),
        "train_images": len(train.labels),
        "images": len(labels),
        "heads": {name: {"accuracy": bench.accuracy(found, labels)} for name, found in trained.items()},
    }
    if split == "test" and not method.startswith("latent-"):
        images = prompted_images(model, material.splits[split].pixels, material.processor)
        stock = heads.load_server(options.model, options.side)
        for encoding in ENCODINGS:
            scores = served(stock, images, encoding, material.processor)
            for name, readout in readouts.items():
                answers = readout.read(scores)
                row["heads"][name][f"{encoding}_accuracy"] = bench.accuracy(answers, labels)
                row["heads"][name][f"{encoding}_agreement"] = bench.accuracy(answers, trained[name].argmax(1))
    return row


@torch.inference_mode()
def prompted_images(model: Adapted, pixels: Tensor, processor: Any) -> Tensor:
    """Return the images (N, C, H, W) that are sent, 8-bit pixels, for 8-bit pixels of the same form."""
    model.eval()
    if model.prompt is not None:
        return torch.cat([to_8_bit(model.prompt.prompted(batch.float() / 255)) for batch in pixels.split(100)])
    if not hasattr(model.server.model, "peft_config"):
        return pixels
    prompter = make_prompter(model.server.model, processor)
    return torch.cat([prompter(batch) for batch in pixels.cpu().split(100)])


@torch.inference_mode()
def served(server: heads.Server, images: Tensor, encoding: str, processor: Any) -> Tensor:
    """Encode and decode images, and answer them with a stock server and its processor: log-probabilities (N, K)."""
    answers = []
    for batch in images.split(100):
        decoded = []
        for image in to_images(batch, Image.Image):
            file = io.BytesIO()
            image.save(file, **ENCODINGS[encoding])
            decoded.append(Image.open(file))
        pixel_values = processor(images=decoded, return_tensors="pt")["pixel_values"].to(bench.DEVICE)
        answers.append(server(pixel_values).log_softmax(-1))
    return torch.cat(answers)


def run_cell(results: bench.Results, method: str, common: dict[str, Any], options: Any) -> None:
    """Choose a learning rate on validation, and run the other seeds on test."""

    def get(rate: float, seed: int, split: str) -> dict[str, Any]:
        key = {"method": method, "head": HEAD, "learning_rate": rate, "seed": seed, "split": split}
        return results.get(key | common, lambda: run(method, rate, seed, split, options))

    known = HEAD_RATES if method == "none" else (PEERS[method] if method in PEERS else PGN_METHODS[method])[1]
    rate, *others = options.rates or known[: options.grid]
    if others:
        rate = max((rate, *others), key=lambda rate: get(rate, 0, "validation")["heads"][HEAD]["accuracy"])
    for seed in options.seeds:
        get(rate, seed, "test")


def make_smoke(folder: Path, options: argparse.Namespace) -> None:
    """Set the options to a tiny model, with enough classes to determine its features, and generated images."""
    data, options.model = bench.make_smoke(folder, num_labels=48)
    options.all_data, options.results = [data], f"{folder}/results.jsonl"
    options.side, options.epochs, options.batch, options.library_size = 32, 1, 8, 8
    options.grid, options.seeds, options.precision, options.generator_image_size = 1, (1,), "float32", None


def main(command_line: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", dest="all_data", nargs="+", help='"digits", folders with train, validation and test.parquet, ...'
    )
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    parser.add_argument("--results", default="outputs/input_only.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates; 1: nothing is chosen")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of training")
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--rates", nargs="+", type=float, help="choose from these learning rates instead")
    parser.add_argument("--library_rate", type=float, default=0.03, help="learning rate of a generator's library")
    parser.add_argument("--generator_image_size", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int, default=1000)
    parser.add_argument("--max_test_samples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            make_smoke(Path(folder), options)
        if not (options.all_data and options.model):
            parser.error("--data and --model are required")
        results = bench.Results(options.results)
        for data in options.all_data:
            options.data = data
            common = {name: getattr(options, name) for name in PROTOCOL}
            common |= {"data": Path(options.data).name, "model": Path(options.model).name}
            for method in options.methods:
                run_cell(results, method, common, options)
        rows = list(results)
        print(report.report(rows))
    return rows


if __name__ == "__main__":
    main()
