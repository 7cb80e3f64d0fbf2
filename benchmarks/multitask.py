"""One generator and library for two data sets, against an adapter for each: accuracy, and use of the library.

    python benchmarks/multitask.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100

The shared adapter has one head for the classes of both data sets; an image's loss and its answer are taken over the
classes of its own data set only, which makes it two heads. It is trained on the images of both, shuffled together,
with the learning rates and epochs of `adaptation.py` (protocol "small"), so that it sees every image as often as the
two adapters do that it is compared with. Those are trained here as well, with the same seed.

The paper claims that a library shared between domains allocates its tokens. What is reported for that: how much the
mean use of the library on one data set overlaps with that on the other (1: the same tokens equally; 0: none in
common), beside the same figure for two random halves of one data set, and for pairs of classes within one data set.

Accuracies are those on test after the last epoch; nothing was chosen here. `--smoke`: a tiny model, in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
from adaptation import PROTOCOLS, Protocol
from image_data import smoke_arguments
from methods import HEAD_RATE, LIBRARY_RATE, PGN_FIELDS, Adapted

from pgn_peft import PGNConfig
from pgn_peft.inspection import mixing_coefficients, usage_by_class
from pgn_peft.training import parameter_groups

RATE = 3e-3


@dataclass
class Task:
    """A data set, and which of the head's outputs are its classes."""

    name: str
    material: bench.Material
    first: int

    @property
    def outputs(self) -> slice:
        """The outputs that are this task's classes."""
        return slice(self.first, self.first + len(self.material.names))


class Masked(nn.Module):
    """A model whose answers are limited to the classes of each image's own data set."""

    def __init__(self, model: nn.Module, tasks: list[Task]) -> None:
        super().__init__()
        self.model = model
        allowed = torch.zeros(len(tasks), sum(len(task.material.names) for task in tasks), dtype=torch.bool)
        for index, task in enumerate(tasks):
            allowed[index, task.outputs] = True
        self.register_buffer("allowed", allowed.to(bench.DEVICE))

    def forward(self, pixels: Tensor, task: Tensor) -> Tensor:
        """Answer pixels (B, C, H, W) in [0, 1] of the tasks (B,) with logits, -inf where a class is another task's."""
        return self.model(pixels).float().masked_fill(~self.allowed[task], float("-inf"))


def train(tasks: list[Task], seed: int, common: Protocol, model_path: str) -> Masked:
    """Train one adapter on all tasks together."""
    set_seed(seed)
    names = [f"{task.name}: {name}" for task in tasks for name in task.material.names]
    fields = PGN_FIELDS | {
        "num_virtual_tokens": common.num_virtual_tokens,
        "generator_image_size": common.generator_image_size,
        "id2label": dict(enumerate(names)),
    }
    adapter = get_peft_model(bench.load_backbone(model_path, common.side), PGNConfig(**fields))
    groups = parameter_groups(adapter, RATE, library_learning_rate=RATE * LIBRARY_RATE, head_learning_rate=HEAD_RATE)
    model = Masked(Adapted(adapter, tasks[0].material), tasks)
    images = torch.cat([task.material.splits["train"].pixels for task in tasks])
    labels = torch.cat([task.material.splits["train"].labels + task.first for task in tasks])
    owners = torch.cat(
        [torch.full_like(task.material.splits["train"].labels, index) for index, task in enumerate(tasks)]
    )
    # bench.train knows images and labels only: what it calls a label is the row, from which both are looked up.
    rows = bench.Split(images, torch.arange(len(labels), device=bench.DEVICE))
    bench.train(
        model,
        rows,
        groups,
        epochs=common.epochs,
        batch_size=common.batch_size,
        flip=True,
        precision=common.precision,
        loss=lambda batch, chosen: F.cross_entropy(model(batch, owners[chosen]), labels[chosen]),
    )
    return model


def evaluate(model: Masked, tasks: list[Task], common: Protocol) -> dict[str, float]:
    """Return the test accuracy on each task."""
    found = {}
    for index, task in enumerate(tasks):
        images = task.material.splits["test"]
        owner = torch.tensor([index], device=bench.DEVICE)
        logits = bench.predict(lambda pixels, owner=owner: model(pixels, owner.expand(len(pixels))), images.pixels)
        found[task.name] = bench.accuracy(logits, images.labels + task.first)
    return found


def overlap(one: Tensor, other: Tensor) -> float:
    """Return how much two distributions over the library (L,) have in common: 0 nothing, 1 they are equal."""
    return torch.minimum(one / one.sum(), other / other.sum()).sum().item()


def allocation(model: Masked, tasks: list[Task]) -> dict[str, Any]:
    """Measure who uses which library tokens, on validation images."""
    coefficients, means, within = [], [], {}
    for task in tasks:
        images = task.material.splits["validation"]
        found = mixing_coefficients(model.model.model, task.material.normalized(images.pixels))
        coefficients.append(found)
        means.append(found.mean(dim=(0, 1)))
        usage = usage_by_class(found, images.labels.cpu(), len(task.material.names))
        usage = usage[usage.sum(dim=1) > 0]
        pairs = [overlap(one, other) for one, other in itertools.combinations(usage, 2)]
        within[task.name] = statistics.mean(pairs)
    order = torch.randperm(len(coefficients[0]), generator=torch.Generator().manual_seed(0))
    halves = [coefficients[0][half].mean(dim=(0, 1)) for half in order.chunk(2)]
    return {
        "overlap_of_data_sets": overlap(*means),
        "overlap_of_two_halves_of_the_first": overlap(*halves),
        "mean_overlap_of_two_classes": within,
        # How far an image's coefficients are from its data set's mean, beside how far the means are apart.
        "spread_within": [c.mean(dim=1).std(dim=0).norm().item() for c in coefficients],
        "distance_of_means": (means[0] - means[1]).norm().item(),
    }


def run(data: tuple[str, str], model_path: str, seed: int, common: Protocol) -> dict[str, Any]:
    """Train together and apart, and compare."""
    materials = [
        bench.load_material(source, model_path, common.side, common.train_images, common.evaluated_images)
        for source in data
    ]
    names = [Path(source).name for source in data]
    together = [Task(names[0], materials[0], 0), Task(names[1], materials[1], len(materials[0].names))]
    shared = train(together, seed, common, model_path)
    row = {"shared": evaluate(shared, together, common), "allocation": allocation(shared, together), "separate": {}}
    for name, material in zip(names, materials, strict=True):
        alone = [Task(name, material, 0)]
        row["separate"] |= evaluate(train(alone, seed, common, model_path), alone, common)
    return row


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs=2, help="two data sets")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--results", default="outputs/multitask.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--threads", type=int, help="of this process; by default all cores")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        common = PROTOCOLS["smoke" if options.smoke else "small"]
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = [f"{folder}/images"] * 2, f"{folder}/vit"
            options.results = f"{folder}/results.jsonl"
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        results = bench.Results(options.results)
        for seed in options.seeds:
            settings = {"data": [Path(source).name for source in options.data], "seed": seed}
            row = results.get(settings, lambda seed=seed: run(options.data, options.model, seed, common))
            print(row["allocation"])
            for name in row["shared"]:
                print(f"{name}: shared {row['shared'][name]:.3f}, separate {row['separate'][name]:.3f}")


if __name__ == "__main__":
    main()
