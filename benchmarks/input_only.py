"""Methods that adapt a frozen model through its input image alone, compared on 8-bit PNGs and JPEGs.

    python benchmarks/input_only.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100 \
        path/to/flowers17 digits
    python benchmarks/input_only.py --report

The server is a stock `ViTForImageClassification` behind its own image processor, with its own head; or a CLIP image
tower whose head is the text embeddings of ImageNet's classes (a folder that holds those too, and `--head text` for a
data set with `classes.json`). It answers with the scores of all its classes.

Heads (`--head`) read the task's classes off the scores (`heads.py`):

- 1:1: one class of the server for each, by frequency on the unprompted training images;
- blm: Bayesian label mapping (BLM+);
- ridge: a linear map of all scores, fitted to the prompted training images after the prompts were trained with "blm";
- trained: a linear head on the features, trained together with the prompts, and computed from the scores;
- text: the server's class of the same name.

Prompts (`--methods`):

- none: the images as they are. With "ridge" and "trained" this is the baseline that prompts must beat;
- border (VP), ring (EVP), smm (SMM), lor-vp (LoR-VP), full: see `pixel_methods.py`;
- static, pgn: PGN, prompts added to the patches of the image: one for all of them, or generated for each;
- pgn-jpeg: half of the prompted images go through JPEG of quality 90 in training;
- pgn-ring: PGN, generated patches around the shrunk image;
- latent-static, latent-pgn: prompts as tokens, which no image can hold: the limit, with heads on features.

All methods see the same images, flips (not of digits), batches, epochs and schedule. Each has two learning rates; one
is chosen by the accuracy on validation with seed 0. A generator's are searched, while its library learns at
`--library_rate`, and a head beside prompts at 0.003. Then other seeds are trained, and evaluated once on test: as
trained, as PNG, and as JPEG of quality 90 and 95, each encoded, decoded, and sent through the processor to a model
that was loaded anew. Training computes in bfloat16 by autocast, evaluation in float32.

Every run is appended to a file of JSON lines, and one that is in it is not repeated. `--report` prints the table of a
file. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import heads
from image_data import smoke_arguments
from pixel_methods import PEERS, NormalizedGradient, PixelPrompt

from pgn_peft import PGNConfig, frequency_mapping, make_prompter
from pgn_peft.nn.images import to_8_bit, to_images
from pgn_peft.nn.preprocessing import normalize
from pgn_peft.training import start_library_from_images

RESULTS = Path(__file__).with_name("results") / "input_only.jsonl"
# PGN's forms: fields of the config, and two rates of the generator (of the prompts, where there is none).
PGN_METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "static": ({"generator": "static", "prompt_space": "pixel", "prompt_layout": "dense"}, (0.03, 0.1)),
    "pgn-ring": ({"prompt_space": "pixel", "prompt_layout": "canvas"}, (0.003, 0.0005)),
    "pgn": ({"prompt_space": "pixel", "prompt_layout": "dense"}, (0.003, 0.0005)),
    "pgn-jpeg": ({"prompt_space": "pixel", "prompt_layout": "dense", "jpeg_quality": 90}, (0.003, 0.0005)),
    "latent-static": ({"generator": "static"}, (0.003, 0.01)),
    "latent-pgn": ({}, (0.003, 0.0005)),
}
METHODS = ("none", *PEERS, *PGN_METHODS)
NAMES = {
    "none": "no prompts",
    "border": "border (VP)",
    "ring": "ring (EVP)",
    "smm": "SMM",
    "lor-vp": "LoR-VP",
    "full": "full pattern",
    "static": "tile (static)",
    "pgn-ring": "PGN, ring",
    "pgn": "**PGN**",
    "pgn-jpeg": "PGN, trained for JPEG",
    "latent-static": "latent: static prompts",
    "latent-pgn": "latent: PGN",
}
HEADS = ("1:1", "blm", "ridge", "trained", "text")
# What prompts are trained with where the head itself is fitted afterwards.
TRAINED_WITH = {"ridge": "blm"}
HEAD_RATES = (0.003, 0.01)  # of a linear head without prompts
HEAD_RATE = 0.003  # of a head beside prompts
# Digits are not the same mirrored.
NOT_FLIPPED = ("digits",)
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
    """A server behind its prompts: pixels (B, C, H, W) in [0, 1] to features (B, D).

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
            return self.prompt.groups(learning_rate)
        library, generator = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (library if ".pgn_library." in name else generator).append(parameter)
        if not generator:
            return [{"params": library, "lr": learning_rate}]
        return [{"params": generator, "lr": learning_rate}, {"params": library, "lr": library_rate}]


@cache
def load_material(data: str, model: str, side: int, train: int | None, evaluated: int | None) -> bench.Material:
    """Load a data set; kept, since many runs in a row use the same."""
    return bench.load_material(data, model, side, train, evaluated)


def build(method: str, server: heads.Server, material: bench.Material, seed: int, options: Any) -> Adapted:
    """Put prompts before a server."""
    if method == "none":
        return Adapted(server, material.scale)
    if method in PEERS:
        return Adapted(server, material.scale, PEERS[method][0](options.side, material.scale)).to(bench.DEVICE)
    fields, _ = PGN_METHODS[method]
    mean, std = map(list, material.scale)
    common = {"library_size": options.library_size, "generator_image_size": options.generator_image_size}
    config = PGNConfig(head="frozen", image_mean=mean, image_std=std, **(common | fields))
    server.model = get_peft_model(server.model, config)
    if config.prompt_layout == "canvas":
        images = material.normalized(material.splits["train"].pixels[:500])
        start_library_from_images(server.model, images, seed=seed)
    return Adapted(server, material.scale)


def features_of(model: Adapted, split: bench.Split) -> Tensor:
    """Return the features (N, D) of a split, computed in float32."""
    return bench.predict(model, split.pixels).clone()  # a tensor that may take part in training


def make_head(name: str, server: heads.Server, material: bench.Material, options: Any) -> heads.Head:
    """Make the head that prompts are trained with; the unprompted training images decide where images do."""
    count, train = len(material.names), material.splits["train"]
    if name == "trained":
        return heads.Trained(server, count)
    if name == "text":
        return heads.Mapped(server, heads.text_mapping(options.data))
    unprompted = Adapted(server, material.scale)
    splits = {name: material.splits[name] for name in ("train", "validation")}
    scores = {name: server.scores(features_of(unprompted, split)) for name, split in splits.items()}
    if name == "blm":
        return heads.fit(name, server, scores, {name: split.labels for name, split in splits.items()}, count)
    return heads.Mapped(server, frequency_mapping(scores["train"].cpu(), train.labels.cpu(), count, server.names))


def train(model: Adapted, head: heads.Head, split: bench.Split, groups: list[dict[str, Any]], options: Any) -> float:
    """Train prompts, and the head if it has parameters."""
    server = model.server

    def loss(batch: Tensor, labels: Tensor) -> Tensor:
        features = model(batch)
        head.observe(server.scores(features.detach()), labels)
        return F.cross_entropy(head(features).float(), labels)

    return bench.train(
        model,
        split,
        groups,
        epochs=options.epochs,
        batch_size=options.batch,
        flip=Path(options.data).name not in NOT_FLIPPED,
        precision=options.precision,
        loss=loss,
        optimizer_class=NormalizedGradient,
        after_epoch=head.end_epoch,
    )


def run(method: str, head_name: str, learning_rate: float | None, seed: int, split: str, options: Any) -> dict:
    """Train one model, and evaluate it on a split; where that is test, also as PNG and as JPEG."""
    set_seed(seed)
    material = load_material(
        options.data, options.model, options.side, options.max_train_samples, options.max_test_samples
    )
    server = heads.load_server(options.model, options.side)
    head = make_head(head_name, server, material, options)
    model = build(method, server, material, seed, options)
    own_head = list(head.parameters())
    groups = [] if method == "none" else model.groups(learning_rate, options.library_rate)
    if own_head:
        groups.append({"params": own_head, "lr": learning_rate if method == "none" else HEAD_RATE})
    start = time.perf_counter()
    loss = train(model, head, material.splits["train"], groups, options) if groups else None
    seconds = time.perf_counter() - start
    wanted = {"train", "validation", split} if head_name == "blm" else {split}
    features = {name: features_of(model, material.splits[name]) for name in wanted}
    labels = {name: material.splits[name].labels for name in features}
    readouts = {head_name: head}
    if head_name == "blm":
        scores = {name: server.scores(found) for name, found in features.items()}
        readouts = {name: heads.fit(name, server, scores, labels, len(material.names)) for name in ("blm", "ridge")}
    with torch.no_grad():
        trained = {name: readout(features[split]) for name, readout in readouts.items()}
    row = {
        "train_loss_last_epoch": loss,
        "train_seconds": round(seconds, 1) if groups else 0,
        "trainable_parameters": sum(parameter.numel() for group in groups for parameter in group["params"]),
        "train_images": len(material.splits["train"].labels),
        "images": len(labels[split]),
        "heads": {name: {"accuracy": bench.accuracy(found, labels[split])} for name, found in trained.items()},
    }
    if split == "test" and not method.startswith("latent-"):
        images = prompted_images(model, material.splits[split].pixels, material.processor)
        stock = heads.load_server(options.model, options.side)
        for encoding in ENCODINGS:
            scores = served(stock, images, encoding, material.processor)
            for name, readout in readouts.items():
                answers = readout.read(scores)
                row["heads"][name][f"{encoding}_accuracy"] = bench.accuracy(answers, labels[split])
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
    """Encode and decode images, and answer them with a stock server behind its processor: log-probabilities (N, K)."""
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


def rates(method: str, head: str, count: int) -> tuple[float | None, ...]:
    """Return the learning rates that a method chooses from; None where nothing is trained."""
    if method == "none":
        return HEAD_RATES[:count] if head == "trained" else (None,)
    return (PEERS[method] if method in PEERS else PGN_METHODS[method])[1][:count]


def run_all(options: argparse.Namespace) -> None:
    """Run what is missing in the results file."""
    results = bench.Results(options.results)
    for data in options.all_data:
        options.data = data
        common = {name: getattr(options, name) for name in PROTOCOL}
        common |= {"data": Path(data).name, "model": Path(options.model).name}
        for head in options.head:
            for method in options.methods:
                if not method.startswith("latent-") or head in ("trained", "text"):
                    run_cell(results, method, head, common, options)


def run_cell(results: bench.Results, method: str, head: str, common: dict[str, Any], options: Any) -> None:
    """Choose a learning rate on validation, and run the other seeds on test."""
    trained_with = TRAINED_WITH.get(head, head)

    def get(rate: float | None, seed: int, split: str) -> dict[str, Any]:
        key = {"method": method, "head": trained_with, "learning_rate": rate, "seed": seed, "split": split}
        return results.get(key | common, lambda: run(method, trained_with, rate, seed, split, options))

    found = rates(method, head, options.grid)
    if options.rates and found != (None,):
        found = tuple(options.rates)
    rate = found[0]
    if len(found) > 1:
        rate = max(found, key=lambda rate: get(rate, 0, "validation")["heads"][head]["accuracy"])
    for seed in options.seeds if rate is not None else options.seeds[:1]:  # without training there is nothing random
        get(rate, seed, "test")


def chosen(rows: list[dict[str, Any]], head: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Gather the tested runs of a head by method and data set, each with the learning rate chosen for that head."""
    searched: dict[tuple[str, str], dict[float | None, float]] = {}
    tested: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        settings = row["settings"]
        place = settings["method"], settings["data"]
        if settings["head"] != TRAINED_WITH.get(head, head):
            continue
        if settings["split"] == "test":
            tested.setdefault(place, []).append(row)
        else:
            searched.setdefault(place, {})[settings["learning_rate"]] = row["heads"][head]["accuracy"]
    for place, found in searched.items():
        best = max(found, key=found.get)
        tested[place] = [row for row in tested.get(place, []) if row["settings"]["learning_rate"] == best]
    return {place: found for place, found in tested.items() if found}


def report(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table for each model, protocol and head: a row a method, two columns a data set."""
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault(tuple(row["settings"][name] for name in ("model", *PROTOCOL)), []).append(row)
    lines = []
    for (model, side, epochs, *_), group in together.items():
        for head in HEADS:
            if cells := chosen(group, head):
                lines += [f"Head: {head} ({model}, {side} px, {epochs} epochs)", "", *table(cells, head), ""]
    return "\n".join(lines)


def table(cells: dict[tuple[str, str], list[dict[str, Any]]], head: str) -> list[str]:
    """Make the lines of one table."""
    data_sets = list(dict.fromkeys(data for _, data in cells))
    columns = ["method", "trained parameters", "learning rate", "PNG as trained"]
    columns += [column for data in data_sets for column in (data, "JPEG 90; 95")]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method in METHODS:
        here = {data: cells[method, data] for data in data_sets if (method, data) in cells}
        if here:
            figures = [figure for data in data_sets for figure in figures_of(here.get(data, []), head)]
            lines.append("| " + " | ".join([NAMES[method], *describe(here, head), *figures]) + " |")
    return lines


def describe(here: dict[str, list[dict[str, Any]]], head: str) -> list[str]:
    """Return a method's trained parameters, its learning rate on each data set, and the lowest agreement."""
    runs = [row for found in here.values() for row in found]
    counts = sorted({row["trainable_parameters"] for row in runs})
    found = ["-" if (rate := runs[0]["settings"]["learning_rate"]) is None else f"{rate:g}" for runs in here.values()]
    agreements = [row["heads"][head]["png_agreement"] for row in runs if "png_agreement" in row["heads"][head]]
    return [
        " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))),
        found[0] if len(set(found)) == 1 else ", ".join(found),
        f"{min(agreements):.3f}" if agreements else "-",
    ]


def figures_of(runs: list[dict[str, Any]], head: str) -> tuple[str, str]:
    """Return mean and standard deviation over the seeds, as PNG (or as trained, in latent space), and as JPEG."""
    found = [run["heads"][head] for run in runs]
    if not found:
        return "-", "-"
    accuracy = [one.get("png_accuracy", one["accuracy"]) for one in found]
    spread = f"±{statistics.stdev(accuracy):.3f}" if len(accuracy) > 1 else ""
    jpeg = [
        f"{statistics.mean(one[name] for one in found):.3f}"
        for name in ("jpeg90_accuracy", "jpeg95_accuracy")
        if name in found[0]
    ]
    return f"{statistics.mean(accuracy):.3f}{spread}", "; ".join(jpeg) or "-"


def make_smoke(folder: Path, options: argparse.Namespace) -> None:
    """Set the options to a tiny model, with enough classes to determine its features, and generated images."""
    smoke_arguments(folder)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, num_labels=48, **tiny)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    options.all_data, options.model, options.results = [f"{folder}/images"], f"{folder}/vit", f"{folder}/results.jsonl"
    options.head = options.head or HEADS[:4]
    options.side, options.epochs, options.batch, options.library_size = 32, 1, 8, 8
    options.grid, options.seeds, options.precision, options.generator_image_size = 1, (1,), "float32", None


def main(command_line: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", dest="all_data", nargs="+", help='"digits", folders with train, validation and test.parquet, ...'
    )
    parser.add_argument("--model", help="id or path of a ViT, or folder of a CLIP image tower with text embeddings")
    parser.add_argument("--head", nargs="+", choices=HEADS, help="by default all but text, which needs CLIP")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    parser.add_argument("--results", help="file of JSON lines, appended to; by default outputs/input_only.jsonl")
    parser.add_argument("--report", action="store_true", help="only print the tables of the results")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates; 1: nothing is chosen")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of training")
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--rates", nargs="+", type=float, help="choose from these learning rates instead")
    parser.add_argument("--library_rate", type=float, default=0.03, help="learning rate of a library by a generator")
    parser.add_argument("--generator_image_size", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int, default=1000)
    parser.add_argument("--max_test_samples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            make_smoke(Path(folder), options)
        elif options.report:
            options.results = options.results or RESULTS
        elif not (options.all_data and options.model):
            parser.error("--data and --model are required")
        options.results = options.results or "outputs/input_only.jsonl"
        options.head = options.head or HEADS[:4]
        if not options.report:
            run_all(options)
        rows = list(bench.Results(options.results))
        print(report(rows))
    return rows


if __name__ == "__main__":
    main()
