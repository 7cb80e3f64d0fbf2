"""Search for a way of sending images to a model that can only be called, with the parts of `adapt_black_box.py`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from adapt_black_box import classify, compare, fit
from background import Report, Watch
from datasets import DatasetDict
from image_data import class_names, spread

from pgn_peft.prompter import Calls, adapt_black_box
from pgn_peft.prompter.black_box import NOTHING, Trial, make_candidates, plan_rungs
from pgn_peft.utils.markdown import markdown_table

IMAGES = 200  # to train with, and to compare with
FEWEST = 4  # training images for each class, also if that is more than `IMAGES`
BUDGET = 8  # calls for each training image
MOST_VIEWS = 2  # calls for each image later


def name_of(candidates: tuple[str, ...]) -> str:
    """Say in which ways an image is sent."""
    return " + ".join(candidates).replace(NOTHING, "unchanged")


def table(trials: Iterable[Trial], chosen: tuple[str, ...] = ()) -> str:
    """Return the last trial of each way of sending in Markdown, those with most images first."""
    last = {trial.names: trial for trial in trials}
    rows = []
    for trial in sorted(last.values(), key=lambda trial: (-trial.images, -trial.accuracy)):
        mark = "**" if trial.names == chosen else ""
        accuracy = f"{trial.accuracy:.3f} ± {trial.standard_error:.3f}"
        sent = f"{mark}{name_of(trial.names)}{mark}"
        rows.append({"sent": sent, "cross-validated accuracy": accuracy, "images": str(trial.images)})
    return markdown_table(rows)


def search(splits: DatasetDict, call: Callable[[bytes], Any], image_size: int, workers: int, watch: Watch) -> None:
    """Search for a way of sending images, and compare it with images as they are.

    Args:
        splits: train and validation, as `load_splits` returns them.
        call: answers a PNG file with entries of `label` and `score`.
        image_size: side of the images to send.
        workers: calls at the same time.
        watch: ends the search after a call.
    """
    names = class_names(splits["train"])
    most = {"train": max(IMAGES, FEWEST * len(names)), "validation": IMAGES}
    rows, others = (splits[split].select(spread(splits[split], 0)[:number]) for split, number in most.items())
    counts = Counter(rows["label"])
    if min(counts[index] for index in range(len(names))) < 2:
        raise ValueError(f"The search needs two training images of each class. Use {FEWEST} images of each or more.")
    candidates = make_candidates(image_size)
    planned = plan_rungs(len(candidates), len(rows), len(names), BUDGET).calls
    later = (MOST_VIEWS + 1) * len(others)
    cost = f"At most {planned:,} calls for {len(rows)} training images, "
    cost += f"then {later:,} for {len(others)} held-out images.\n\n"
    watch.report = Report("starting", cost)
    trials: list[Trial] = []
    numbers = itertools.count(1)

    def counted(file: bytes) -> Any:
        watch.check()
        answer = call(file)
        watch.report = replace(watch.report, text=f"call {next(numbers):,} of at most {planned + later:,}")
        return answer

    def show(trial: Trial) -> None:
        trials.append(trial)
        watch.report = replace(watch.report, table=cost + table(trials))

    calls, images, labels = Calls(counted, workers=workers, attempts=2), list(rows["image"]), rows["label"]
    found = adapt_black_box(images, labels, calls, names, image_size, candidates, MOST_VIEWS, BUDGET, show)
    alone = classify(fit(candidates[NOTHING], calls, rows), calls, others)
    adapted = classify(found.views, calls, others)
    gain, error = compare(alone, adapted)
    text = f"Sent for each image: {name_of(found.names)}. Accuracy on {len(others)} held-out images: "
    text += f"{adapted.mean():.3f}; unchanged images alone {alone.mean():.3f} (difference {gain:+.3f} ± {error:.3f})."
    watch.report = Report(text, cost + table(trials, found.names))
