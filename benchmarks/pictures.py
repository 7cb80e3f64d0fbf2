"""The two plots of docs/results.md, from recorded rows.

    python benchmarks/pictures.py

writes docs/images/parameters.png (test accuracy against trained parameters, EuroSAT at 224 px) and dependence.png
(what an image's own prompts gain over another image's). `--smoke` writes them elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import matplotlib
import report
from bench import Results
from plotting import OURS, STYLE, THEIRS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS = Path(__file__).parent / "results"
UNTRAINED = ("ridge", "untrained", "untrained-deep")
SHIFTS = {"ridge": 4, "untrained": -4, "untrained-deep": 7}  # in points, of names that would cover each other
DOMAINS = {  # results file, data set -> name
    ("few_images.jsonl", "counting, 8"): "counting shapes, 8 of each class",
    ("adaptation.jsonl", "digits"): "digits, 1,000",
    ("few_images.jsonl", "digits, 2"): "digits, 2 of each class",
    ("few_images.jsonl", "eurosat+shuffled, 8"): "EuroSAT shuffled, 8 of each class",
    ("few_images.jsonl", "eurosat, 8"): "EuroSAT, 8 of each class",
    ("adaptation.jsonl", "eurosat"): "EuroSAT, 1,000",
    ("adaptation.jsonl", "flowers17"): "Flowers-17, 680",
    ("adaptation.jsonl", "cifar100"): "CIFAR-100, 1,000",
}


def draw_parameters(file: Path) -> None:
    """Draw the mean test accuracy of each method on EuroSAT, with the standard deviation over seeds."""
    cells = report.chosen(report.read(Results(ROWS / "own_size.jsonl")))
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for method, name in report.LATENT.items():
        if ("eurosat", method) not in cells:
            continue
        cell = cells["eurosat", method]
        tests = [run.test for run in cell.runs]
        spread = statistics.stdev(tests) if len(tests) > 1 else 0
        colour = OURS if "PGN" in name else THEIRS
        fill = "white" if method in UNTRAINED else colour
        parameters = cell.runs[0].parameters
        ax.errorbar(parameters, cell.mean, spread, fmt="o", color=colour, mfc=fill, ms=6, capsize=3)
        side = -1 if parameters < 3000 else 1
        place = {"xytext": (8 * side, SHIFTS.get(method, 0)), "textcoords": "offset points"}
        aligned = {"ha": "right" if side < 0 else "left", "va": "center", "fontsize": 9}
        ax.annotate(name.strip("*"), (parameters, cell.mean), **place, **aligned)
    best = max(cells["eurosat", method].mean for method in UNTRAINED)
    ax.axhline(best, color=THEIRS, lw=0.8, ls="--")
    ax.set(xscale="log", xlim=(3, 5e8), xlabel="trained parameters", ylabel="test accuracy")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_dependence(file: Path) -> None:
    """Draw how much accuracy on validation falls when each image gets another image's prompts: the seeds' mean."""
    figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
    for place, (results, data) in enumerate(reversed(DOMAINS)):
        runs = [run for run in report.read(Results(ROWS / results)) if (run.data, run.method) == (data, "pgn")]
        tested = report.chosen(runs)[data, "pgn"].runs
        gain = 100 * statistics.mean(run.validation - run.shuffled for run in tested)
        ax.barh(place, gain, color=OURS)
        ax.text(max(gain, 0) + 0.5, place, f"{gain:+.1f}", va="center")
    ax.set_yticks(range(len(DOMAINS)), list(DOMAINS.values())[::-1])
    ax.set(xlabel="points that own prompts gain over another image's", xlim=(-3, 55))
    ax.axvline(0, color="black", lw=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROWS.parents[1] / "docs/images")
    parser.add_argument("--smoke", action="store_true", help="into a temporary folder")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder, plt.rc_context(STYLE):
        output = Path(folder) if options.smoke else options.output_dir
        draw_parameters(output / "parameters.png")
        draw_dependence(output / "dependence.png")
        size = sum(path.stat().st_size for path in (output / "parameters.png", output / "dependence.png"))
        print(f"two pictures, {size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
