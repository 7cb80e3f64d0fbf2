"""Growth of cost: time and memory of a step against prompts, library, image size, batch and number of adapters.

    python benchmarks/growth.py --plots docs/images

One thing is changed at a time, on a DeiT-Tiny of random weights; all values of it take turns in one process. Beside
each measured time stands the time expected from the counted operations, relative to the second value, since fixed
costs dominate the smallest. Memory is a training step's saved activations, plus the weights.

`--smoke`: a tiny model, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import methods
import step_time
import timing
from sizes import random_material
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True)
class Point:
    """A training step with PGN; sides in pixels."""

    num_virtual_tokens: int = 16
    library_size: int = 64
    image_side: int = 224
    batch_size: int = 8
    adapters: int = 1


KNOBS: dict[str, tuple[int, ...]] = {
    "num_virtual_tokens": (1, 4, 16, 64, 128),
    "library_size": (16, 64, 256, 1024),
    "image_side": (112, 160, 224, 320),
    "batch_size": (1, 4, 8, 16, 32),
    "adapters": (1, 4, 16, 64),
}
SMOKE = {name: values[:2] for name, values in KNOBS.items()} | {"image_side": (32, 64)}


def make(model: str, point: Point) -> step_time.Runner:
    """Make the model of a point, with its adapters loaded and the first one active."""
    torch.manual_seed(0)
    material = random_material(point.image_side, point.batch_size)
    options = methods.Options(1e-3, point.num_virtual_tokens, 64, {"library_size": point.library_size})
    backbone = step_time.make_backbone(model, "float32", image_size=point.image_side)
    adapted, groups = methods.pgn(backbone, material, options)
    for number in range(1, point.adapters):
        adapted.model.add_adapter(f"adapter_{number}", adapted.model.peft_config["default"])
    adapted.to(bench.DEVICE)
    split = material.splits["train"]
    return step_time.Runner(
        adapted, groups, split.pixels[: point.batch_size], split.labels[: point.batch_size], "float32"
    )


def grow(model: str, knob: str, values: tuple[int, ...], base: Point, rounds: int) -> dict[str, Any]:
    """Measure a step at each value of one knob."""
    runners = {value: make(model, replace(base, **{knob: value})) for value in values}
    train = timing.take_turns({str(value): runner.train for value, runner in runners.items()}, rounds)
    infer = timing.take_turns({str(value): runner.infer for value, runner in runners.items()}, rounds)
    weights = {value: list(runner.model.parameters()) for value, runner in runners.items()}
    return {
        "values": list(values),
        "train_seconds": [statistics.median(train[str(value)]) for value in values],
        "inference_seconds": [statistics.median(infer[str(value)]) for value in values],
        "train_flops": [timing.count_flops(runner.backward) for runner in runners.values()],
        "inference_flops": [timing.count_flops(runner.infer) for runner in runners.values()],
        "memory_bytes": [
            timing.count_saved_bytes(runner.forward, weights[value]) + sum(each.nbytes for each in weights[value])
            for value, runner in runners.items()
        ],
    }


def expected(seconds: list[float], flops: list[int]) -> list[float]:
    """Return the times that follow from the operations and the second measured time."""
    return [seconds[1] * each / flops[1] for each in flops]


def steepest(rows: list[dict[str, Any]]) -> float:
    """Return the largest ratio of a measured to an expected training step, beyond the first value of each knob."""
    return max(
        seconds / forecast
        for row in rows
        for seconds, forecast in list(
            zip(row["train_seconds"], expected(row["train_seconds"], row["train_flops"]), strict=True)
        )[1:]
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Write all knobs as one Markdown table."""
    lines = [
        "| | value | training step, ms | / expected | inference, ms | / expected | memory, MB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        train = expected(row["train_seconds"], row["train_flops"])
        infer = expected(row["inference_seconds"], row["inference_flops"])
        for index, value in enumerate(row["values"]):
            cells = [
                row["settings"]["knob"].replace("_", " ") if index == 0 else "",
                f"{value:,}",
                f"{1e3 * row['train_seconds'][index]:.0f}",
                f"{row['train_seconds'][index] / train[index]:.2f}",
                f"{1e3 * row['inference_seconds'][index]:.0f}",
                f"{row['inference_seconds'][index] / infer[index]:.2f}",
                f"{row['memory_bytes'][index] / 1e6:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw time and memory against each knob into growth.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from plotting import OURS, STYLE, THEIRS, THIRD

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, len(rows), figsize=(3 * len(rows), 5.2), layout="constrained", sharex="col")
    for (above, below), row in zip(axes.T, rows, strict=True):
        values = row["values"]
        for kind, colour in (("train", OURS), ("inference", THEIRS)):
            seconds = row[f"{kind}_seconds"]
            above.plot(values, [1e3 * each for each in expected(seconds, row[f"{kind}_flops"])], ":", color=colour)
            above.plot(values, [1e3 * each for each in seconds], "o-", color=colour)
            above.annotate(kind, (values[-1], 1e3 * seconds[-1]), (6, -3), textcoords="offset points", color=colour)
        above.set_xlim(right=1.5 * values[-1] - 0.5 * values[0])  # room for the labels
        below.plot(values, [each / 1e6 for each in row["memory_bytes"]], "o-", color=THIRD)
        below.set_xlabel(row["settings"]["knob"].replace("_", " "))
        for axis in (above, below):
            axis.set_ylim(0, 1.12 * axis.dataLim.y1)
    axes[0, 0].set_ylabel("milliseconds a step\n(dotted: from operations)")
    axes[1, 0].set_ylabel("memory, MB")
    figure.savefig(folder / "growth.png")
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in step_time.MODELS if name != "smoke"], default="deit-tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--plots", type=Path, help="folder for growth.png")
    parser.add_argument("--results", default="outputs/growth.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args(command_line)
    transformers_logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    base, knobs = Point(), KNOBS
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            base, knobs = Point(image_side=32, batch_size=2), SMOKE
            options.model, options.rounds = "smoke", 2
            options.results, options.plots = f"{folder}/results.jsonl", options.plots or Path(folder)
        results = bench.Results(options.results)
        rows = []
        for knob, values in knobs.items():
            settings = {"benchmark": "growth", "model": options.model, "knob": knob, "base": asdict(base)}
            settings |= {"values": list(values), "rounds": options.rounds, "threads": torch.get_num_threads()}
            rows.append(
                results.get(
                    settings, lambda knob=knob, values=values: grow(options.model, knob, values, base, options.rounds)
                )
            )
        print(table(rows))
        print(f"\nsteepest training step: {steepest(rows):.3f} of what its operations let one expect")
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
            draw(rows, options.plots)


if __name__ == "__main__":
    main()
