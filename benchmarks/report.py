"""Tables of accuracy, and which differences to rely on, from the runs of `adaptation.py` and `input_only.py`.

    python benchmarks/report.py                                   # the README's runs
    python benchmarks/report.py --results outputs/adaptation.jsonl --against lora
    python benchmarks/report.py --results benchmarks/results/input_only.jsonl

Runs that have their protocol in common form a table. Each figure is the mean ± the standard deviation over the seeds;
in brackets the number of seeds, and of settings that were tried on validation to choose this one.

Differences are paired: two methods with the same seed see the same images. t is the mean difference over the seeds,
divided by its standard error. A method is called ahead or behind only if t is above 2 or below -2; with three seeds
this still happens by chance once in five to six comparisons of equals. Everything else is level, or has one seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Results, markdown

RESULTS = Path(__file__).with_name("results") / "adaptation.jsonl"
# In the order of the tables; with how they are called there. Some runs are of methods that were removed since.
LATENT = {
    "linear": "linear probe",
    "ridge": "ridge regression",
    "untrained": "untrained prompts, first layer",
    "untrained-deep": "untrained prompts, every layer",
    "k-nn": "nearest neighbours",
    "head": "linear head",
    "generator alone": "CNN alone (the generator's)",
    "border": "border (visual prompting)",
    "pgn-pixel": "PGN, valid pixels",
    "static": "static prompts (VPT-shallow)",
    "pgn": "**PGN**",
    "pgn-lean": "**PGN, lean**",
    "vpt-deep": "VPT-deep",
    "static-sum": "static prompts, every layer",
    "pgn-deep": "**PGN, every layer, former start**",
    "pgn-sum": "**PGN, every layer**",
    "lora": "LoRA, r = 8",
    "layer-norm": "LayerNorm tuning",
    "full": "full fine-tuning",
}
INPUT_ONLY = {
    "none": "no prompts",
    "static": "tile (static)",
    "border": "border (VP)",
    "ring": "ring (EVP)",
    "lor-vp": "LoR-VP",
    "full": "full pattern",
    "smm": "SMM",
    "pgn-ring": "PGN, ring",
    "pgn": "**PGN**",
    "pgn-jpeg": "PGN, trained for JPEG",
    "latent-static": "latent: static prompts",
    "latent-pgn": "latent: PGN",
}
# What the other methods are compared with, where it is there.
REFERENCES = ("linear", "untrained-deep", "none", "static")
# Settings of `input_only.py` that name a run; the others are its protocol.
OF_A_RUN = ("method", "head", "learning_rate", "seed", "split", "data")


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        table: what it has in common with all runs that it may be compared with.
        data: name of the data set, with the number of images of each class where that is small.
        method: its name.
        rate: the learning rate; None where there is none to choose.
        seed: of weights, batches and, where images are few, of their choice.
        changes: what differs from the protocol; empty in the tables of methods.
        parameters: number of trained parameters; 0 where the row has none.
        validation: accuracy; None where it was not evaluated.
        test: likewise. With prompts in pixel space as PNG files.
        jpeg: on test, as JPEG files of quality 90.
        shuffled: on validation, with the prompts of another image.
    """

    table: str
    data: str
    method: str
    rate: float | None
    seed: int
    changes: str = ""
    parameters: int = 0
    validation: float | None = None
    test: float | None = None
    jpeg: float | None = None
    shuffled: float | None = None


@dataclass(frozen=True)
class Cell:
    """The tested runs of a method on a data set, one for each seed, and how many settings they were chosen from."""

    runs: list[Run]
    trials: int

    @property
    def mean(self) -> float:
        """The mean test accuracy."""
        return statistics.mean(run.test for run in self.runs)

    def __str__(self) -> str:
        tests = [run.test for run in self.runs]
        spread = f" ± {statistics.stdev(tests):.3f}" if len(tests) > 1 else ""
        jpeg = [run.jpeg for run in self.runs if run.jpeg is not None]
        encoded = f", JPEG {statistics.mean(jpeg):.3f}" if jpeg else ""
        return f"{self.mean:.3f}{spread} ({len(tests)}; {self.trials}){encoded}"


@dataclass(frozen=True)
class Difference:
    """How far one method is ahead of another, over their common seeds."""

    mean: float
    t: float
    seeds: int

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if self.seeds < 2:
            return "one seed"
        return "ahead" if self.t > 2 else "behind" if self.t < -2 else "level"

    def __str__(self) -> str:
        t = "" if self.seeds < 2 else f"t {self.t:.1f}, "
        return f"{100 * self.mean:+.1f} ({t}{self.verdict})"


Cells = dict[tuple[str, str], Cell]  # by data set and method


def read(rows: Iterable[dict[str, Any]]) -> list[Run]:
    """Turn rows of results into runs; rows of the same run become one."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        for key, figures in _read_latent(row) if "protocol" in row["settings"] else _read_input_only(row):
            known = {name: figure for name, figure in figures.items() if figure is not None}
            found.setdefault(key, {}).update(known)
    return [Run(*key, **figures) for key, figures in found.items()]


def _read_latent(row: dict[str, Any]) -> Iterable[tuple[tuple, dict[str, Any]]]:
    settings, overrides = row["settings"], dict(row["settings"]["overrides"])
    shots = overrides.pop("shots", None)
    data = settings["data"] if shots is None else f"{settings['data']}, {shots}"
    changes = ", ".join(f"{name} {value}" for name, value in overrides.items())
    table = f"{settings['protocol']}, {settings['model']}"
    figures = {
        "parameters": row.get("trainable_parameters"),
        "validation": row.get("validation_accuracy"),
        "test": row.get("test_accuracy"),
        "shuffled": row.get("validation_accuracy_shuffled_prompts"),
    }
    yield (table, data, settings["method"], settings["rate"], settings["seed"], changes), figures


def _read_input_only(row: dict[str, Any]) -> Iterable[tuple[tuple, dict[str, Any]]]:
    settings = row["settings"]
    protocol = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in OF_A_RUN)
    for head, accuracy in row["heads"].items():
        tested = settings["split"] == "test"
        figures = {
            "parameters": row["trainable_parameters"],
            "validation": None if tested else accuracy["accuracy"],
            "test": accuracy.get("png_accuracy", accuracy["accuracy"]) if tested else None,
            "jpeg": accuracy.get("jpeg90_accuracy"),
        }
        name = settings["method"], settings["learning_rate"], settings["seed"]
        yield (f"head {head}, {protocol}", settings["data"], *name, ""), figures


def chosen(runs: Iterable[Run]) -> Cells:
    """Gather the tested runs of one table; of several rates the one that is best on validation with the first seed."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        groups[run.data, run.method].append(run)
    cells = {}
    for place, group in groups.items():
        validated = {run.rate: run.validation for run in reversed(group) if run.validation is not None}
        tested = [run for run in group if run.test is not None and not run.changes]
        if tested:
            best = max((run.rate for run in tested), key=lambda rate: validated.get(rate, 0))
            trials = {(run.rate, run.changes) for run in group if run.validation is not None}
            cells[place] = Cell([run for run in tested if run.rate == best], max(1, len(trials)))
    return cells


def difference(one: Cell, other: Cell) -> Difference | None:
    """Compare two methods seed by seed; a result that no seed changes is compared with all of the other's."""
    tests = [{run.seed: run.test for run in cell.runs} for cell in (one, other)]
    for place, cell in enumerate((one, other)):
        if len(cell.runs) == 1 and cell.runs[0].rate is None:
            tests[place] = dict.fromkeys(tests[1 - place], cell.runs[0].test)
    seeds = tests[0].keys() & tests[1].keys()
    if not seeds:
        return None
    differences = [tests[0][seed] - tests[1][seed] for seed in seeds]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(mean, t, len(seeds))


def data_sets(cells: Cells) -> list[str]:
    """Return the names of the data sets in the order in which they were run."""
    return list(dict.fromkeys(data for data, _ in cells))


def method_table(cells: Cells, names: dict[str, str]) -> str:
    """Write a row for each method, and a column for each data set."""
    columns = data_sets(cells)
    lines = [["method", "trained parameters", *columns]]
    for method, name in names.items():
        counts = sorted({run.parameters for (_, other), cell in cells.items() if other == method for run in cell.runs})
        if counts:
            span = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
            lines.append([name, span, *(cells.get((data, method), "-") for data in columns)])
    return markdown(lines)


def difference_table(cells: Cells, names: dict[str, str], reference: str) -> str:
    """Write the differences to one method in points of accuracy, a row for each of the others."""
    columns = [data for data in data_sets(cells) if (data, reference) in cells]
    lines = [["points more than " + names[reference].strip("*"), *columns]]
    for method, name in names.items():
        here = {data: cells[data, method] for data in columns if (data, method) in cells}
        if here and method != reference:
            found = {data: difference(cell, cells[data, reference]) for data, cell in here.items()}
            lines.append([name, *(found.get(data) or "-" for data in columns)])
    return markdown(lines)


def winner_table(cells: Cells, names: dict[str, str]) -> str:
    """Write for each data set the best method, of how many trials, and what is level with it."""
    lines = [["data", "best", "accuracy (seeds; trials)", "points more than the second", "level with it"]]
    for data in data_sets(cells):
        here = {method: cell for (other, method), cell in cells.items() if other == data and method in names}
        best, *others = sorted(here, key=lambda method: -here[method].mean)
        if others:
            differences = {method: difference(here[best], here[method]) for method in others}
            level = [names[method] for method, found in differences.items() if found and found.verdict == "level"]
            second = f"{differences[others[0]]} {names[others[0]]}"
            lines.append([data, names[best], here[best], second, "; ".join(level) or "-"])
    return markdown(lines)


def choice_table(runs: Iterable[Run], names: dict[str, str], changed: bool = False) -> str:
    """Write the validation accuracy of every setting that was tried with the first seed.

    Args:
        runs: of one table.
        names: of the methods.
        changed: write those whose settings differ from the protocol, and in brackets the accuracy with the prompts of
            another image.
    """
    validated = [run for run in runs if run.validation is not None and bool(run.changes) == changed]
    first = min((run.seed for run in validated), default=0)
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in validated:
        if run.seed == first:
            other = f" ({run.shuffled:.3f})" if changed and run.shuffled is not None else ""
            rate = "" if run.rate is None else f" at {run.rate:g}"
            found[run.method, run.changes][run.data].append(f"{run.validation:.3f}{other}{rate}")
    columns = list(dict.fromkeys(run.data for run in validated))
    lines = [["method", "changes", *columns]]
    for (method, changes), cell in found.items():
        lines.append([names.get(method, method), changes or "-", *(", ".join(cell[data]) or "-" for data in columns)])
    return markdown(lines)


def report(rows: Iterable[dict[str, Any]], split: str = "test", against: Iterable[str] = REFERENCES) -> str:
    """Write all tables of some rows.

    Args:
        rows: of `adaptation.py` or `input_only.py`; others are not read.
        split: "validation": only what was tried.
        against: methods that the others are compared with.
    """
    tables: dict[str, list[Run]] = defaultdict(list)
    for run in read(row for row in rows if {"protocol", "head"} & row.get("settings", {}).keys()):
        tables[run.table].append(run)
    parts = []
    for title, runs in tables.items():
        names, cells = (INPUT_ONLY if title.startswith("head ") else LATENT), chosen(runs)
        parts.append(f"## {title}")
        if any(run.validation is not None and not run.changes for run in runs):
            parts += ["Tried on validation", choice_table(runs, names)]
        if any(run.changes for run in runs):
            parts += ["Changes, on validation (with another image's prompts)", choice_table(runs, names, changed=True)]
        if cells and split == "test":
            parts += ["Test: mean ± standard deviation (seeds; settings tried)", method_table(cells, names)]
            for method in against:
                if method in names and sum(key[1] == method for key in cells) and len(cells) > 1:
                    parts.append(difference_table(cells, names, method))
            parts.append(winner_table(cells, names))
    return "\n\n".join(parts)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--against", nargs="+", default=REFERENCES, help="methods that the others are compared with")
    parser.add_argument("--smoke", action="store_true", help="as without it: it takes seconds anyway")
    options = parser.parse_args(command_line)
    rows = list(Results(options.results))
    print(report(rows, against=options.against))
    print(f"\n{len(rows)} rows, {sum(row.get('seconds', 0) for row in rows) / 3600:.1f} hours of computing")


if __name__ == "__main__":
    main()
