"""Tables and plots of the runs that `adaptation.py` has made.

    python benchmarks/report.py                                   # Markdown, of the README's runs
    python benchmarks/report.py --results outputs/adaptation.jsonl --plots docs/images
    python benchmarks/report.py --protocol few --results benchmarks/results/few_images.jsonl

`--plots FOLDER` also draws `accuracy.png` (every method on every data set) and `parameters.png` (accuracy against the
number of trained parameters). `--smoke` draws them into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from plotting import OURS, STYLE, THEIRS

RESULTS = Path(__file__).with_name("results") / "adaptation.jsonl"
# In the order of the tables; with how they are called there.
NAMES = {
    "linear": "linear probe",
    "k-nn": "nearest neighbours",
    "head": "linear head",
    "generator alone": "CNN alone (the generator's)",
    "border": "border (visual prompting)",
    "pgn-pixel": "PGN, valid pixels",
    "static": "static prompts (VPT-shallow)",
    "pgn": "**PGN**",
    "pgn-lean": "**PGN, lean**",
    "vpt-deep": "VPT-deep",
    "pgn-deep": "**PGN, every layer**",
    "lora": "LoRA, r = 8",
    "layer-norm": "LayerNorm tuning",
    "full": "full fine-tuning",
}


@dataclass
class Runs:
    """The runs of one method on one data set with one choice of settings."""

    rate: float | None
    parameters: int
    validation: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def figure(self, split: str = "test") -> str:
        """Return mean and standard deviation over the seeds, and how many there are."""
        values = getattr(self, split)
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}" + (f" ({len(values)})" if len(values) > 1 else "")


def read(path: Path, protocol: str) -> list[dict[str, Any]]:
    """Return the rows of a protocol. With few images of each class, their number becomes part of the data's name."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        settings = row["settings"]
        shots = settings["overrides"].pop("shots", None)
        if shots is not None:
            settings["data"] += f", {shots}"
    return [row for row in rows if row["settings"]["protocol"] == protocol]


def chosen(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Runs]:
    """Gather the tested runs by data set and method; of several rates the one that is best on the first validation."""
    found: dict[tuple[str, str], dict[float | None, Runs]] = defaultdict(dict)
    trained = {_key(row): row for row in rows if "validation_accuracy" in row}
    for row in sorted(rows, key=lambda row: row["settings"]["seed"]):
        settings = row["settings"]
        if settings["overrides"] or "test_accuracy" not in row:
            continue
        run = trained[_key(row)]
        rates = found[settings["data"], settings["method"]]
        runs = rates.setdefault(settings["rate"], Runs(settings["rate"], run["trainable_parameters"]))
        runs.test.append(row["test_accuracy"])
        runs.validation.append(run["validation_accuracy"])
    return {cell: max(rates.values(), key=lambda runs: runs.validation[0]) for cell, rates in found.items()}


def _key(row: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in row["settings"].items() if name != "split"}, sort_keys=True)


def data_sets(cells: Iterable[tuple[str, str]]) -> list[str]:
    """Return the data sets' names in the order in which they were run."""
    return list(dict.fromkeys(data for data, _ in cells))


def table(rows: list[dict[str, Any]], split: str = "test") -> str:
    """Make a Markdown table: a row a method, a column a data set, mean ± standard deviation (number of seeds)."""
    cells = chosen(rows)
    names = data_sets(cells)
    lines = ["| method | trained parameters | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method, name in NAMES.items():
        here = {data: cells[data, method] for data in names if (data, method) in cells}
        if here:
            counts = [runs.parameters for runs in here.values()]
            span = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
            figures = " | ".join(here[data].figure(split) if data in here else "-" for data in names)
            lines.append(f"| {name} | {span} | {figures} |")
    return "\n".join(lines)


def choices(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table of the validation accuracy at each learning rate, with the seed that chose."""
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    first = min((row["settings"]["seed"] for row in rows), default=0)
    for row in rows:
        settings = row["settings"]
        if "validation_accuracy" in row and settings["seed"] == first and not settings["overrides"]:
            rate = settings["rate"] if settings["rate"] is not None else row.get("c", row.get("k"))
            found[settings["data"], settings["method"]][rate] = row["validation_accuracy"]
    names = data_sets(found)
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, name in NAMES.items():
        figures = [
            ", ".join(f"{accuracy:.3f} at {rate:g}" for rate, accuracy in found.get((data, method), {}).items()) or "-"
            for data in names
        ]
        if any(figure != "-" for figure in figures):
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def ablations(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table of the runs with something changed, on validation."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    first = min((row["settings"]["seed"] for row in rows), default=0)
    changed = [row for row in rows if "validation_accuracy" in row and row["settings"]["seed"] == first]
    methods = {row["settings"]["method"] for row in changed if row["settings"]["overrides"]}
    for row in changed:
        settings = row["settings"]
        if settings["method"] in methods:
            text = ", ".join(f"{name} {value}" for name, value in settings["overrides"].items())
            key = (settings["method"], f"{text or '(as in the table)'}, rate {settings['rate']:g}")
            found[key][settings["data"]] = row
    names = data_sets((data, "") for cell in found.values() for data in cell)
    lines = [
        "| method | what is changed | trained parameters | " + " | ".join(names) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for (method, text), cell in found.items():
        figures = []
        for data in names:
            row = cell.get(data)
            shuffled = None if row is None else row.get("validation_accuracy_shuffled_prompts")
            figures.append(
                "-"
                if row is None
                else f"{row['validation_accuracy']:.3f}" + (f" ({shuffled:.3f})" if shuffled is not None else "")
            )
        parameters = next(iter(cell.values()))["trainable_parameters"]
        lines.append(f"| {method} | {text} | {parameters:,} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def plot_accuracy(rows: list[dict[str, Any]], ax: Axes) -> None:
    """Draw every method's test accuracy on every data set: a dot a seed, a bar for their mean."""
    cells = chosen(rows)
    names = data_sets(cells)
    methods = [method for method in NAMES if any((data, method) in cells for data in names)]
    width = 0.8 / len(methods)
    ours = [method for method in methods if method.startswith("pgn")]
    peers = [method for method in methods if method not in ours]
    for place, method in enumerate(methods):
        kind, colours = (ours, "Oranges") if method in ours else (peers, "Blues")
        colour = plt.get_cmap(colours)(0.3 + 0.5 * kind.index(method) / max(1, len(kind) - 1))
        for group, data in enumerate(names):
            if (data, method) not in cells:
                continue
            test = cells[data, method].test
            at = group + (place - (len(methods) - 1) / 2) * width
            label = NAMES[method].strip("*") if group == _first_with(cells, names, method) else None
            ax.bar(at, statistics.mean(test), width, color=colour, label=label)
            ax.plot([at] * len(test), test, "k.", markersize=3)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="test accuracy", ylim=(0, 1))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _first_with(cells: dict[tuple[str, str], Runs], names: list[str], method: str) -> int:
    return next(index for index, data in enumerate(names) if (data, method) in cells)


def plot_parameters(rows: list[dict[str, Any]], axes: Iterable[Axes]) -> None:
    """Draw test accuracy against the number of trained parameters, a panel a data set."""
    cells = chosen(rows)
    panels = []
    for ax, data in zip(axes, data_sets(cells), strict=True):
        points = [
            (statistics.mean(cells[data, method].test), cells[data, method].parameters, method)
            for method in NAMES
            if (data, method) in cells
        ]
        for accuracy, parameters, method in points:
            ax.plot(parameters, accuracy, "o", color=OURS if method.startswith("pgn") else THEIRS)
        ax.set(xscale="log", xlabel="trained parameters", title=data)
        ax.margins(x=0.35, y=0.12)
        panels.append((ax, points))
    panels[0][0].figure.canvas.draw()  # settles where all panels and points are
    for ax, points in panels:
        names = [NAMES[method].strip("*").partition(" (")[0] for _, _, method in points]
        _name_points(ax, [(parameters, accuracy) for accuracy, parameters, _ in points], names)


def _name_points(ax: Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Write each point's name beside it, on the first side where it covers no other point and no other name."""
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(points)]
    for point, name in sorted(zip(points, names, strict=True)):
        for place, side in (((6, -6), "left"), ((6, 3), "left"), ((-6, -6), "right"), ((-6, 3), "right")):
            text = ax.annotate(name, point, place, textcoords="offset points", fontsize=6, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = ax.annotate(name, point, (6, -6), textcoords="offset points", fontsize=6)
        taken.append(text.get_window_extent())


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write both plots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    plot_accuracy(rows, ax)
    figure.savefig(folder / "accuracy.png")
    number = len(data_sets(chosen(rows)))
    columns = min(number, 2)
    figure, axes = plt.subplots(
        -(-number // columns),
        columns,
        figsize=(4.5 * columns, 3 * -(-number // columns)),
        layout="constrained",
        squeeze=False,
    )
    for unused in axes.flat[number:]:
        unused.axis("off")
    for row in axes:
        row[0].set_ylabel("test accuracy")
    plot_parameters(rows, axes.flat[:number])
    figure.savefig(folder / "parameters.png")
    plt.close("all")


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--protocol", choices=("small", "few", "full", "smoke"), default="small")
    parser.add_argument("--plots", type=Path, help="folder to draw into")
    parser.add_argument("--smoke", action="store_true", help="draw into a temporary folder")
    options = parser.parse_args(command_line)
    rows = read(options.results, options.protocol)
    print(f"### Chosen on validation\n\n{choices(rows)}\n")
    print(f"### Changes, on validation (in brackets: with another image's prompts)\n\n{ablations(rows)}\n")
    hours = sum(row["seconds"] for row in rows) / 3600
    print(f"{len(rows)} rows, {hours:.1f} hours of computing\n")
    print(f"### Test\n\n{table(rows)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke or options.plots:
            draw(rows, options.plots or Path(folder))


if __name__ == "__main__":
    main()
