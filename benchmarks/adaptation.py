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
`--protocol own --interior`: 500 images at the model's own size (224 px), 100 steps, beside heads on features of the
frozen model, without prompts and with prompts that nobody trained; two to three minutes a run on one core.
`--protocol full`: 224 px, all training images: for an accelerator.

Every run is a line of JSON in the results file: settings, accuracy, hardware, versions, seconds. A run that is in it
is not repeated, so an interrupted benchmark continues where it stopped. The learning rate is chosen from a grid of
equal size for each method (the linear probe, which is cheap, has seven choices) with the first seed, by the accuracy
on validation after the last epoch. With `--interior` the grid grows while its lowest or highest rate is the best. Only
then are all seeds trained with that rate, and tested.

`--smoke`: a tiny model on generated images, offline, in seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import bench
import methods
import report
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import set_seed

from pgn_peft.inspection import shuffled_prompts
from pgn_peft.nn.heads import fit_ridge
from pgn_peft.training.rungs import find_heads


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
        refit: fit a second head to the final features of the training images, by ridge regression. The head that is
            better on validation counts.
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
    refit: bool = False


PROTOCOLS = {
    "small": Protocol(),
    "few": Protocol(train_images=None, evaluated_images=1000, shots=8, steps=100, precision="float32"),
    "own": Protocol(side=None, train_images=500, evaluated_images=1000, epochs=5, refit=True),
    "full": Protocol(side=None, train_images=None, batch_size=64, generator_image_size=None),
    "smoke": Protocol(
        side=None, epochs=1, batch_size=8, precision="float32", generator_image_size=None, num_virtual_tokens=4
    ),
}
PROBE = "linear"
# Ridge regression on features of the frozen model: without prompts, and with untrained ones before the first layer or
# before each. -> their `prompt_depth`
UNTRAINED = {"ridge": None, "untrained": 1, "untrained-deep": "all"}
DRAWS = 3  # of untrained prompts
MOST_RATES = 5
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


@lru_cache(maxsize=MOST_RATES)
def fit(cell: Cell) -> tuple[nn.Module, float, tuple[Tensor, Tensor] | None]:
    """Train one model. The last few are kept: that of the best rate is tested next.

    Returns:
        The model, its mean loss in the last epoch, and the refitted head's weight and bias if there is one.
    """
    set_seed(cell.seed)
    common, material, config = cell.common, material_of(cell), cell.adapter
    library_rate = config.pop("library_rate", methods.LIBRARY_RATE)
    options = methods.Options(
        cell.rate, common.num_virtual_tokens, common.generator_image_size, config, library_rate=library_rate
    )
    build, _ = methods.METHODS[cell.method]
    model, groups = build(bench.load_backbone(cell.model, common.side), material, options)
    train = material.splits["train"]
    count = len(train.labels)
    batch_size = min(common.batch_size, count)
    loss = bench.train(
        model,
        train,
        groups,
        epochs=common.epochs if common.steps is None else round(common.steps / (count // batch_size)),
        batch_size=batch_size,
        flip=not cell.data.endswith(bench.NOT_FLIPPED),
        precision=common.precision,
    )
    if not common.refit:
        return model, loss, None
    features = predict_features(model, train.pixels, common.precision)[1]
    return model, loss, fit_ridge(features, train.labels.cpu(), len(material.names))[:2]


def predict_features(model: nn.Module, pixels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return a model's logits (N, M), and the features (N, F) that its head takes."""
    adapted = model.model.backbone if isinstance(model.model, methods.VPTDeep) else model.model
    taken: list[Tensor] = []
    handle = find_heads(adapted)[0].register_forward_pre_hook(lambda head, inputs: taken.append(inputs[0].cpu()))
    logits = bench.predict(model, pixels, precision)
    handle.remove()
    return logits, torch.cat(taken).float()


def run(cell: Cell, split: str) -> dict[str, Any]:
    """Train one model, and evaluate it on validation; on test too where that is the split."""
    model, loss, refitted = fit(cell)
    common, material = cell.common, material_of(cell)
    row = {
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "train_images": len(material.splits["train"].labels),
        "train_loss_last_epoch": round(loss, 4),
    }
    heads: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(("validation", split)):
        images = material.splits[name]
        logits, features = predict_features(model, images.pixels, common.precision)
        heads.setdefault("trained", {})[name] = bench.accuracy(logits, images.labels)
        if refitted is not None:
            logits = features.double() @ refitted[0].mT + refitted[1]
            heads.setdefault("refitted", {})[name] = bench.accuracy(logits, images.labels.cpu())
    chosen = max(heads, key=lambda name: heads[name]["validation"])
    row |= {f"{name}_accuracy": accuracy for name, accuracy in heads[chosen].items()}
    if refitted is not None:
        row |= {"head": chosen, "heads": heads}
    if cell.method in ("pgn", "pgn-lean", "pgn-deep", "pgn-sum"):
        row["validation_accuracy_shuffled_prompts"] = shuffled(model, material.splits["validation"], common.precision)
    return row


def untrained(cell: Cell, split: str) -> dict[str, Any]:
    """Fit heads to features of the frozen model, with prompts that are drawn and never trained, or with none.

    The draw is chosen by cross-validation on the training images.
    """
    common, material, depth = cell.common, material_of(cell), UNTRAINED[cell.method]
    labels = {name: images.labels.cpu() for name, images in material.splits.items()}

    def predicted(model: nn.Module, name: str) -> Tensor:
        return predict_features(model, material.splits[name].pixels, common.precision)[1]

    fitted = []  # of each draw: cross-validated accuracy, model, weight and bias
    for draw in range(DRAWS * cell.seed, DRAWS * (cell.seed + 1)) if depth is not None else (0,):
        set_seed(draw)
        options = methods.Options(0.0, common.num_virtual_tokens, None, {"accumulate_prompts": False})
        fields = {"num_virtual_tokens": 0, "prompt_depth": 1} if depth is None else {"prompt_depth": depth}
        model, _ = methods.static(bench.load_backbone(cell.model, common.side), material, options, **fields)
        weight, bias, cross_validated = fit_ridge(predicted(model, "train"), labels["train"], len(material.names))
        fitted.append((cross_validated, model, weight, bias))
    best = max(fitted, key=lambda draw: draw[0])
    draws = []
    # Few images are drawn with several seeds; else the other draws are evaluated too.
    for cross_validated, model, weight, bias in fitted if common.shots is None else [best]:
        row = {"cross_validated_accuracy": cross_validated}
        for name in dict.fromkeys(("validation", split if model is best[1] else "validation")):
            row[f"{name}_accuracy"] = bench.accuracy(predicted(model, name).double() @ weight.mT + bias, labels[name])
        draws.append(row)
    chosen = max(draws, key=lambda row: row["cross_validated_accuracy"])
    parameters = sum(each.numel() for each in find_heads(best[1].model)[1].parameters())
    counts = {"trainable_parameters": parameters, "train_images": len(labels["train"])}
    return counts | chosen | {"draws": draws, "cross_validated": [draw[0] for draw in fitted]}


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
        # Of a head on the frozen model's features nothing is random but the choice of few images, and the draws.
        seeds = options.seeds if cell.common.shots is not None else options.seeds[:1]
        if method == PROBE:
            for seed in seeds:
                seeded = replace(cell, seed=seed)
                results.get(seeded.settings, lambda cell=seeded: probe(cell))
        elif method in UNTRAINED:
            split = "test" if options.test else "validation"
            for seed in seeds:
                seeded = replace(cell, seed=seed)
                results.get(seeded.settings | {"split": split}, partial(untrained, seeded, split))
        else:
            chosen = choose(
                results, cell, options.rates or methods.METHODS[method][1][: options.grid], options.interior
            )
            for seed in options.seeds if options.test else ():
                tested = replace(chosen, seed=seed)
                results.get(tested.settings | {"split": "test"}, lambda cell=tested: run(cell, "test"))


def choose(results: bench.Results, cell: Cell, rates: Sequence[float], interior: bool) -> Cell:
    """Return the cell with the learning rate that is best on validation.

    Args:
        results: where runs are looked up and written.
        cell: without a rate.
        rates: to choose from, in rising order.
        interior: add a rate beside the best one while that is the lowest or the highest, up to `MOST_RATES`.
    """

    def validated(rate: float) -> float:
        candidate = replace(cell, rate=rate)
        return results.get(candidate.settings, lambda: run(candidate, "validation"))["validation_accuracy"]

    rates = list(rates)
    while True:
        best = max(rates, key=validated)
        if not interior or len(rates) == MOST_RATES or rates[0] < best < rates[-1]:
            return replace(cell, rate=best)
        # Rates are three apart, written as 1 and 3: 1e-3, 3e-3, 1e-2.
        step = 10**0.5 if best == rates[-1] else 10**-0.5
        rates = sorted([*rates, float(f"{best * step:.0e}")])


def parse_override(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as JSON or else as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(command_line: list[str] | None = None) -> None:
    every = (PROBE, *UNTRAINED, *methods.METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        nargs="+",
        help="'digits', 'counting', folders with train, validation and test, or ids; +shuffled, +mixed",
    )
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--methods", nargs="+", choices=every, default=[each for each in every if each != "head"])
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="the first one chooses the rate")
    parser.add_argument("--protocol", choices=("small", "few", "own", "full"), default="small")
    parser.add_argument("--shots", type=int, nargs="+", default=(None,), help="images of each class")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates")
    parser.add_argument("--interior", action="store_true", help="more rates while the best is at the edge of the grid")
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
