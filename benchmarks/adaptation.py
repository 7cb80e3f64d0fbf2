"""PGN and the alternatives to it, on the same frozen backbone.

The table: every method on every data set, its learning rate chosen on validation, then three seeds, test once.

    python benchmarks/adaptation.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100 \
        path/to/flowers17 digits
    python benchmarks/report.py --results outputs/adaptation.jsonl

A single cell: `--data digits --methods pgn --seeds 0`. Another setting: `--set library_size=16 --no-test`, with any
field of `PGNConfig` or of the protocol (below), or `library_rate`; `report.py` lists such runs in a table of changes.

`--protocol small` (the default): 112 px, at most 1,000 training images, 12 epochs: for a CPU, two to three minutes a
run on one core; start two processes with other `--methods` or `--data` on two cores (they may share a results file).
`--protocol few --shots 2 8`: two and eight images of each class, chosen by the seed, and 100 steps.
`--protocol full`: 224 px, all training images: for an accelerator.

Every run is a line of JSON in the results file: settings, accuracy, hardware, versions, seconds. A run that is in it
is not repeated, so an interrupted benchmark continues where it stopped. The learning rate is chosen from a grid of
equal size for each method (the linear probe, which is cheap, has seven choices) with the first seed, by the accuracy
on validation after the last epoch. Only then are all seeds trained with that rate, and tested. `--smoke`: a tiny model
on generated images, offline, in seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import bench
import methods
import report
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import set_seed

from pgn_peft.inspection import shuffled_prompts


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Args:
        side: of the images, in pixels; None: the image processor's own.
        train_images: at most so many; None: all.
        evaluated_images: at most so many validation and test images; None: all.
        epochs: passes over the training images.
        batch_size: images a step.
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
PROBE = "linear"
CHOICES_OF_C = tuple(10.0**power for power in range(-3, 4))


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


def material_of(cell: Cell) -> bench.Material:
    """Return the images of a cell."""
    common = cell.common
    material = bench.load_material(cell.data, cell.model, common.side, common.train_images, common.evaluated_images)
    if common.shots is None:
        return material
    train = material.splits["train"]
    few = bench.few_of_each_class(train.labels, common.shots, cell.seed)
    chosen = bench.Split(train.pixels[few], train.labels[few])
    return replace(material, splits=material.splits | {"train": chosen})


def run(cell: Cell, split: str) -> dict[str, Any]:
    """Train one model, and evaluate it on validation; on test too where that is the split."""
    set_seed(cell.seed)
    common, material, config = cell.common, material_of(cell), cell.adapter
    library_rate = config.pop("library_rate", methods.LIBRARY_RATE)
    options = methods.Options(
        cell.rate, common.num_virtual_tokens, common.generator_image_size, config, library_rate=library_rate
    )
    build, _ = methods.METHODS[cell.method]
    model, groups = build(bench.load_backbone(cell.model, common.side), material, options)
    count = len(material.splits["train"].labels)
    batch_size = min(common.batch_size, count)
    loss = bench.train(
        model,
        material.splits["train"],
        groups,
        epochs=common.epochs if common.steps is None else round(common.steps / (count // batch_size)),
        batch_size=batch_size,
        flip=not cell.data.endswith(bench.NOT_FLIPPED),
        precision=common.precision,
    )
    row = {
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "train_images": count,
        "train_loss_last_epoch": round(loss, 4),
    }
    for name in dict.fromkeys(("validation", split)):
        images = material.splits[name]
        row[f"{name}_accuracy"] = bench.accuracy(bench.predict(model, images.pixels, common.precision), images.labels)
    if cell.method in ("pgn", "pgn-lean", "pgn-deep", "pgn-sum"):
        row["validation_accuracy_shuffled_prompts"] = shuffled(model, material.splits["validation"], common.precision)
    return row


def shuffled(model: nn.Module, images: bench.Split, precision: str) -> float:
    """Return the accuracy when every image gets the prompts of another one."""
    # Splits are sorted by class, and the image before would be one of the same class.
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0)).to(bench.DEVICE)
    with shuffled_prompts(model):
        logits = bench.predict(model, images.pixels[order], precision)
    return bench.accuracy(logits, images.labels[order])


@cache
def frozen_features(data: str, model: str, common: Protocol) -> dict[str, tuple[Any, Any]]:
    """Return features and labels of all splits, by the frozen backbone."""
    material = bench.load_material(data, model, common.side, common.train_images, common.evaluated_images)
    backbone = bench.load_backbone(model, common.side)
    backbone.classifier = nn.Identity()
    adapted = methods.Adapted(backbone, material)
    return {
        name: (bench.predict(adapted, split.pixels).cpu().numpy(), split.labels.cpu().numpy())
        for name, split in material.splits.items()
    }


def probe(cell: Cell) -> dict[str, Any]:
    """Fit a logistic regression to the frozen backbone's features."""
    common = cell.common
    found = frozen_features(cell.data, cell.model, replace(common, shots=None))
    features, labels = found["train"]
    if common.shots is not None:
        few = bench.few_of_each_class(torch.tensor(labels), common.shots, cell.seed).numpy()
        features, labels = features[few], labels[few]
    tried = {c: LogisticRegression(C=c, max_iter=5000).fit(features, labels) for c in CHOICES_OF_C}
    scores = {c: fitted.score(*found["validation"]) for c, fitted in tried.items()}
    best = max(scores, key=scores.get)
    return {
        "trainable_parameters": tried[best].coef_.size + tried[best].intercept_.size,
        "c": best,
        "train_images": len(labels),
        "validation_accuracy": scores[best],
        "test_accuracy": tried[best].score(*found["test"]),
    }


def compare(results: bench.Results, options: argparse.Namespace) -> None:
    """Run what is missing: choose each method's rate, then train and test with all seeds."""
    for data, shots, method in product(options.data, options.shots, options.methods):
        few = () if shots is None else (("shots", shots),)
        cell = Cell(data, options.model, method, None, options.seeds[0], options.protocol, (*few, *options.set))
        if method == PROBE:
            # Nothing is random but the choice of few images.
            for seed in options.seeds if cell.common.shots is not None else options.seeds[:1]:
                seeded = replace(cell, seed=seed)
                results.get(seeded.settings, lambda cell=seeded: probe(cell))
            continue
        chosen = choose(results, cell, options.rates or methods.METHODS[method][1][: options.grid])
        for seed in options.seeds if options.test else ():
            tested = replace(chosen, seed=seed)
            results.get(tested.settings | {"split": "test"}, lambda cell=tested: run(cell, "test"))


def choose(results: bench.Results, cell: Cell, rates: Sequence[float]) -> Cell:
    """Return the cell with the learning rate that is best on validation."""

    def validated(candidate: Cell) -> float:
        row = results.get(candidate.settings, lambda: run(candidate, "validation"))
        return row["validation_accuracy"]

    return max((replace(cell, rate=rate) for rate in rates), key=validated)


def parse_override(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as JSON or else as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(command_line: list[str] | None = None) -> None:
    every = (PROBE, *methods.METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", help="'digits', 'counting', folders with train, validation and test, or ids; +shuffled"
    )
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--methods", nargs="+", choices=every, default=[each for each in every if each != "head"])
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="the first one chooses the rate")
    parser.add_argument("--protocol", choices=("small", "few", "full"), default="small")
    parser.add_argument("--shots", type=int, nargs="+", default=(None,), help="images of each class")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates")
    parser.add_argument("--rates", nargs="+", type=float, help="choose from these learning rates instead")
    parser.add_argument("--no-test", dest="test", action="store_false", help="leave the test split alone")
    parser.add_argument("--set", nargs="*", type=parse_override, default=(), help="fields to change, name=value")
    parser.add_argument("--results", default="outputs/adaptation.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--threads", type=int, help="of this process; by default all cores")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    options.set = tuple(options.set)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            data, options.model = bench.make_smoke(folder)
            options.data, options.results = [data], f"{folder}/results.jsonl"
            options.protocol, options.grid, options.seeds = "smoke", 1, (0,)
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        results = bench.Results(options.results)
        compare(results, options)
        print(report.report(list(results), "validation" if not options.test else "test"))


if __name__ == "__main__":
    main()
