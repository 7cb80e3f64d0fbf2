"""PGN and the alternatives to it, on the same frozen backbone.

The table: every method on every data set, its learning rate chosen on validation, then three seeds, test once.

    python benchmarks/adaptation.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100 \
        path/to/flowers17 digits
    python benchmarks/report.py

A single cell: `--data digits --methods pgn --seeds 0`. Another setting: `--set library_size=16 --no-test`, with any
field of `PGNConfig` or of the protocol. `--ablations` runs a list of such settings on validation, at the learning rate
that the table has chosen, the most informative first; `--ablations train_images` only those that change this field.

`--protocol small` (the default): 112 px, at most 1,000 training images, 12 epochs: for a CPU, two to three minutes a
run on one core; start two processes with other `--methods` or `--data` on two cores (they may share a results file).
`--protocol full`: 224 px, all training images: for an accelerator.

Every run is a line of JSON in the results file: settings, accuracy, hardware, versions, seconds. A run that is in it
is not repeated, so an interrupted benchmark continues where it stopped. The learning rate is chosen from a grid of
equal size for each method (linear probe and nearest neighbours, which are cheap, have seven and five choices) with the
first seed, by the accuracy on validation after the last epoch. Only then are the runs with that rate tested, once
each. What was trained is kept until then in a folder beside the results file.

`--protocol few --shots 2 8`: two and eight images of each class, chosen by the seed, and 100 steps.

`--smoke`: a tiny model on generated images, offline, in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import methods
import report
from image_data import smoke_arguments

from pgn_peft.inspection import prompts_of_other_images


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Args:
        side: of the images, in pixels; None: the image processor's own.
        train_images: at most so many; None: all.
        evaluated_images: at most so many validation and test images; None: all.
        epochs: passes over the training images.
        batch_size: images a step.
        crop: smallest share of a training image that is cut out; 1: no cropping.
        precision: "float32", or "bfloat16" by autocast.
        generator_image_size: side of what the generator sees, in pixels.
        num_virtual_tokens: prompts per image of every method with prompts.
        shots: at most so many training images of each class, chosen by the seed; None: all.
        steps: train for so many steps, instead of epochs.
    """

    side: int | None = 112
    train_images: int | None = 1000
    evaluated_images: int | None = None
    epochs: int = 12
    batch_size: int = 25
    crop: float = 1.0
    precision: str = "bfloat16"
    generator_image_size: int | None = 64
    num_virtual_tokens: int = 16
    shots: int | None = None
    steps: int | None = None


PROTOCOLS = {
    "small": Protocol(),
    "few": Protocol(train_images=None, evaluated_images=1000, shots=8, steps=100, precision="float32"),
    "full": Protocol(side=None, train_images=None, batch_size=64, generator_image_size=None),
    "smoke": Protocol(
        side=None, epochs=1, batch_size=8, precision="float32", generator_image_size=None, num_virtual_tokens=4
    ),
}

# Two learning rates for each method to choose from: those between which each was best in trials on validation.
METHODS: dict[str, tuple[Callable[..., methods.Built], tuple[float, ...]]] = {
    "head": (methods.linear, (3e-3,)),
    "full": (methods.full, (1e-4, 3e-4)),
    "vpt-deep": (methods.vpt_deep, (3e-4, 1e-3)),
    "lora": (methods.lora, (1e-3, 3e-3)),
    "layer-norm": (methods.layer_norm, (3e-3, 1e-2)),
    "border": (methods.border, (3e-2, 1e-1)),
    "generator alone": (methods.generator_alone, (3e-3, 1e-2)),
    "static": (methods.static, (3e-3, 1e-2)),
    "pgn": (methods.pgn, (1e-3, 3e-3)),
    "pgn-lean": (methods.pgn_lean, (1e-3, 3e-3)),
    "pgn-pixel": (methods.pgn_pixel, (3e-2, 1e-1)),
    "pgn-deep": (methods.pgn_deep, (3e-4, 1e-3)),
}
LINEAR = "linear"
PROBES = (LINEAR, "k-nn")
CHOICES_OF_C = tuple(10.0**power for power in range(-3, 4))
CHOICES_OF_K = (1, 3, 5, 10, 20)
# One thing changed at a time, the most telling first; static prompts beside PGN where it concerns both.
ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pgn", {"slot_prompts": False}),
    ("pgn", {"train_images": 250}),
    ("static", {"train_images": 250}),
    *((method, {"train_images": 5000}) for method in ("pgn", "static", "vpt-deep", "pgn-deep")),
    ("pgn", {"num_virtual_tokens": 4}),
    ("static", {"num_virtual_tokens": 4}),
    ("pgn", {"library_rate": 1.0}),
    ("pgn", {"library_size": 16}),
    ("pgn", {"library_size": 256}),
    ("pgn", {"initial_logit_std": 0.0}),
    ("pgn", {"num_virtual_tokens": 32}),
    ("static", {"num_virtual_tokens": 32}),
    ("pgn", {"num_virtual_tokens": 8}),
    ("static", {"num_virtual_tokens": 8}),
    ("pgn", {"generator_norm": "group"}),
    ("pgn", {"mixing": "sigmoid"}),
    ("pgn", {"generator_image_size": 32}),
    ("pgn", {"generator_image_size": None}),
    ("pgn", {"generator_width": 8}),
    ("pgn", {"slot_prompts": False, "initial_logit_std": 0.0, "library_rate": 1.0}),  # the official form
)
# Digits are not the same mirrored, nor are blocks in a fixed order.
NOT_FLIPPED = ("digits", bench.SHUFFLED)


@dataclass(frozen=True)
class Cell:
    """One run: everything that makes it what it is."""

    data: str
    model: str
    method: str
    rate: float | None
    seed: int
    protocol: str
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What is written down, and what a run is found again by: names, no folders of this machine."""
        names = {"data": Path(self.data).name, "model": Path(self.model).name}
        return asdict(self) | names | {"overrides": dict(self.overrides)}

    @property
    def common(self) -> Protocol:
        """The protocol with what is overridden of it."""
        own = {name: value for name, value in self.overrides if name in protocol_fields()}
        return replace(PROTOCOLS[self.protocol], **own)

    @property
    def adapter(self) -> dict[str, Any]:
        """What else is overridden: fields of `PGNConfig`, and the library's learning rate."""
        return {name: value for name, value in self.overrides if name not in protocol_fields()}


def protocol_fields() -> set[str]:
    """Return the names of the protocol's fields."""
    return {field.name for field in fields(Protocol)}


@cache
def load_material(data: str, model: str, side: int | None, train: int | None, evaluated: int | None) -> bench.Material:
    """Load a data set; kept, since many runs in a row use the same."""
    return bench.load_material(data, model, side, train, evaluated)


def material_of(cell: Cell) -> bench.Material:
    """Return the images of a cell."""
    common = cell.common
    material = load_material(cell.data, cell.model, common.side, common.train_images, common.evaluated_images)
    train = chosen = material.splits["train"]
    if common.shots is not None:
        few = bench.few_of_each_class(train.labels, common.shots, cell.seed)
        chosen = bench.Split(train.pixels[few], train.labels[few])
    return replace(material, splits=material.splits | {"train": chosen, "unlabelled": train})


def build(cell: Cell) -> methods.Built:
    """Make the model of a cell, and what of it is trained."""
    config = cell.adapter
    library_rate = config.pop("library_rate", methods.LIBRARY_RATE)
    common = cell.common
    options = methods.Options(
        cell.rate, common.num_virtual_tokens, common.generator_image_size, config, library_rate=library_rate
    )
    return METHODS[cell.method][0](bench.load_backbone(cell.model, common.side), material_of(cell), options)


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Return what training has changed: trainable parameters and running statistics."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained or "running_" in name}


def state_file(results: bench.Results, cell: Cell) -> Path:
    """Return where what a run has learned is kept until it is tested."""
    key = hashlib.sha256(json.dumps(cell.settings, sort_keys=True).encode()).hexdigest()[:16]
    return results.path.parent / f"{results.path.stem}-states" / f"{key}.safetensors"


def run(results: bench.Results, cell: Cell) -> dict[str, Any]:
    """Train one model, keep it, and evaluate it on validation."""
    set_seed(cell.seed)
    common, material = cell.common, material_of(cell)
    model, groups = build(cell)
    count = len(material.splits["train"].labels)
    batch_size = min(common.batch_size, count)
    epochs = common.epochs if common.steps is None else round(common.steps / (count // batch_size))
    loss = bench.train(
        model,
        material.splits["train"],
        groups,
        epochs=epochs,
        batch_size=batch_size,
        flip=not cell.data.endswith(NOT_FLIPPED),
        crop=common.crop,
        precision=common.precision,
    )
    file = state_file(results, cell)
    file.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in learned(model).items()}, file)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "train_images": count,
        "train_loss_last_epoch": round(loss, 4),
        "validation_accuracy": evaluate(model, cell, "validation"),
        **shuffled(model, cell),
    }


def evaluate(model: nn.Module, cell: Cell, split: str) -> float:
    """Return the accuracy on a split."""
    images = material_of(cell).splits[split]
    return bench.accuracy(bench.predict(model, images.pixels, cell.common.precision), images.labels)


def shuffled(model: nn.Module, cell: Cell) -> dict[str, float]:
    """Return the validation accuracy when every image gets the prompts of another one."""
    if cell.method not in ("pgn", "pgn-lean", "pgn-deep"):
        return {}
    # Splits are sorted by class, and the image before would be one of the same class.
    images = material_of(cell).splits["validation"]
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0)).to(bench.DEVICE)
    with prompts_of_other_images(model):
        logits = bench.predict(model, images.pixels[order], cell.common.precision)
    return {"validation_accuracy_shuffled_prompts": bench.accuracy(logits, images.labels[order])}


def test(results: bench.Results, cell: Cell) -> dict[str, Any]:
    """Evaluate a finished run on test."""
    file = state_file(results, cell)
    if not file.is_file():
        run(results, cell)
    model, _ = build(cell)
    model.load_state_dict(load_file(file, device=str(bench.DEVICE)), strict=False)
    accuracy = evaluate(model, cell, "test")
    file.unlink()
    return {"test_accuracy": accuracy}


@cache
def frozen_features(data: str, model: str, common: Protocol) -> dict[str, tuple[Any, Any]]:
    """Return features and labels of all splits, by the frozen backbone."""
    material = load_material(data, model, common.side, common.train_images, common.evaluated_images)
    backbone = bench.load_backbone(model, common.side)
    backbone.classifier = nn.Identity()
    adapted = methods.Adapted(backbone, material)
    return {
        name: (bench.predict(adapted, split.pixels).cpu().numpy(), split.labels.cpu().numpy())
        for name, split in material.splits.items()
    }


def probe(cell: Cell) -> dict[str, Any]:
    """Fit a logistic regression, or nearest neighbours, to the frozen backbone's features."""
    common = cell.common
    found = frozen_features(cell.data, cell.model, replace(common, shots=None))
    features, labels = found["train"]
    if common.shots is not None:
        few = bench.few_of_each_class(torch.tensor(labels), common.shots, cell.seed).numpy()
        features, labels = features[few], labels[few]

    def fit(choice: float) -> Any:
        if cell.method == LINEAR:
            return LogisticRegression(C=choice, max_iter=5000).fit(features, labels)
        return KNeighborsClassifier(choice, metric="cosine").fit(features, labels)

    choices = CHOICES_OF_C if cell.method == LINEAR else [k for k in CHOICES_OF_K if k <= len(labels)]
    tried = {choice: fit(choice) for choice in choices}
    scores = {choice: probe.score(*found["validation"]) for choice, probe in tried.items()}
    best = max(scores, key=scores.get)
    count = tried[best].coef_.size + tried[best].intercept_.size if cell.method == LINEAR else 0
    return {
        "trainable_parameters": count,
        "c" if cell.method == LINEAR else "k": best,
        "train_images": len(labels),
        "validation_accuracy": scores[best],
        "test_accuracy": tried[best].score(*found["test"]),
    }


def compare(results: bench.Results, options: argparse.Namespace) -> None:
    """Run what is missing for the table: choose each method's rate, then train with the other seeds, then test."""
    for data, shots, method in product(options.data, options.shots, options.methods):
        few = () if shots is None else (("shots", shots),)
        cell = Cell(data, options.model, method, None, options.seeds[0], options.protocol, (*few, *options.set))
        if method in PROBES:
            # Nothing is random but the choice of few images.
            for seed in options.seeds if cell.common.shots is not None else options.seeds[:1]:
                seeded = replace(cell, seed=seed)
                results.get(seeded.settings, lambda cell=seeded: probe(cell))
            continue
        chosen = choose(results, cell, options.grid, options.rates)
        for seed in options.seeds:
            report = replace(chosen, seed=seed)
            train_once(results, report)
            if options.test:
                results.get(report.settings | {"split": "test"}, lambda cell=report: test(results, cell))


def ablate(results: bench.Results, options: argparse.Namespace) -> None:
    """Run what is missing of the ablations, with the first seed and the rate that was chosen for the table."""
    for method, overrides in ABLATIONS:
        if options.ablations and not overrides.keys() & set(options.ablations):
            continue
        for data in options.data:
            cell = Cell(data, options.model, method, None, options.seeds[0], options.protocol)
            changed = replace(choose(results, cell, options.grid), overrides=tuple(overrides.items()))
            if len(material_of(changed).splits["train"].labels) >= overrides.get("train_images", 0):
                train_once(results, changed)


def choose(results: bench.Results, cell: Cell, grid: int, rates: Sequence[float] | None = None) -> Cell:
    """Return the cell with the learning rate of the grid, or of `rates`, that is best on validation."""
    candidates = [replace(cell, rate=rate) for rate in rates or METHODS[cell.method][1][:grid]]
    return max(candidates, key=lambda candidate: train_once(results, candidate)["validation_accuracy"])


def train_once(results: bench.Results, cell: Cell) -> dict[str, Any]:
    """Return the row of a training run, made if it is not there."""
    return results.get(cell.settings, lambda: run(results, cell))


def parse_override(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as JSON or else as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(command_line: list[str] | None = None) -> None:
    every = (*PROBES, *METHODS)
    in_table = [method for method in every if method not in ("k-nn", "head")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", help="'digits', 'counting', folders with train, validation and test, or ids; +shuffled"
    )
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--methods", nargs="+", choices=every, default=in_table)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="the first one chooses the rate")
    parser.add_argument("--protocol", choices=("small", "few", "full"), default="small")
    parser.add_argument("--shots", type=int, nargs="+", default=(None,), help="images of each class")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates")
    parser.add_argument("--rates", nargs="+", type=float, help="choose from these learning rates instead")
    parser.add_argument("--no-test", dest="test", action="store_false", help="leave the test split alone")
    parser.add_argument("--set", nargs="*", type=parse_override, default=(), help="fields to change, name=value")
    parser.add_argument(
        "--ablations", nargs="*", metavar="FIELD", help="change one thing at a time instead; only these, if any"
    )
    parser.add_argument("--results", default="outputs/adaptation.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--threads", type=int, help="of this process; by default all cores")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    options.set = tuple(options.set)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = [f"{folder}/images"], f"{folder}/vit"
            options.results = f"{folder}/results.jsonl"
            options.protocol, options.grid, options.seeds = "smoke", 1, (0,)
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        results = bench.Results(options.results)
        if options.ablations is not None:
            ablate(results, options)
        else:
            compare(results, options)
        rows = report.read(results.path, options.protocol)
        print(report.table(rows) if options.test else report.choices(rows))


if __name__ == "__main__":
    main()
