"""Reads the labels and scores in a server's answer, and finds out what kind of numbers the scores are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read_entries(answer: Iterable[Any]) -> list[tuple[str, float]]:
    """Return the labels and scores in an answer. Two classes of a server can have the same label.

    Args:
        answer: entries with `label` and `score`, as dictionaries or as objects, from a pipeline or an endpoint.

    Raises:
        TypeError: `answer` is not a list of entries with `label` and `score`.
        ValueError: a score is not a finite number.
    """
    entries = []
    for entry in answer:
        try:
            is_mapping = isinstance(entry, (dict, Mapping))  # a dictionary is recognised much faster
            label, score = (entry["label"], entry["score"]) if is_mapping else (entry.label, entry.score)
        except (AttributeError, KeyError) as error:
            raise TypeError(f"An answer is a list of entries with `label` and `score`, not {answer!r}.") from error
        if not math.isfinite(float(score)):
            raise ValueError(f"The score of {label!r} is {score}.")
        entries.append((str(label), float(score)))
    return entries


def by_label(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return scores by label; the larger one if two classes have the same label."""
    scores: dict[str, float] = {}
    for label, score in entries:
        scores[label] = max(score, scores.get(label, score))
    return scores


def as_row(entries: Sequence[tuple[str, float]], labels: Sequence[str]) -> Tensor:
    """Order an answer's scores: (K,) float64 by `labels`, NaN where one is missing."""
    scores = by_label(entries)
    return torch.tensor([scores.get(label, math.nan) for label in labels], dtype=torch.float64)


def find_scale(answers: Sequence[Sequence[float]], complete: bool) -> str:
    """Find out what a server's scores are.

    Args:
        answers: the scores of one answer or of several, of one server; empty ones are skipped.
        complete: whether each answer holds the scores of all classes.

    Returns:
        "logits" if a score is negative or above 100; "percent" if one is above 1 and all classes sum to about 100.
        With scores up to 1, "softmax" if they sum to at most 1, and to 1 if they are complete; else "sigmoid".
        Rounding can change the sum by a tenth, and by more where it makes scores 0.

    Raises:
        ValueError: the scores can be percentages as well as logits.
    """
    answers = [scores for scores in answers if scores] or [[1.0]]
    smallest, largest = min(map(min, answers)), max(map(max, answers))
    if smallest < 0 or largest > 100:
        return "logits"
    if largest > 1:
        # Percentages without decimals can lose much of the sum; logits are never exactly 0.
        if complete and all(abs(sum(scores) - 100) <= (10 if 0 in scores else 1) for scores in answers):
            return "percent"
        raise ValueError(
            f"Scores from {smallest:g} to {largest:g} that do not sum to 100 can be percentages or logits. Divide "
            "percentages by 100, or turn logits into probabilities, before you pass them."
        )
    too_small = complete and any(min(scores) > 0 and sum(scores) < 0.9 for scores in answers)
    return "sigmoid" if too_small or any(sum(scores) > 1.1 for scores in answers) else "softmax"


def log_scores(scores: Tensor, scale: str) -> Tensor:
    """Convert scores to logits, up to one number for each answer.

    Args:
        scores: (N, K), NaN where a score is missing.
        scale: see `find_scale`.

    Returns:
        (N, K) float64, NaN where a score is missing. A score of 0 was rounded or underflowed; it counts as half of the
        smallest positive score of its answer.
    """
    scores = scores.double()
    if scale == "logits":
        return scores
    if scale == "percent":
        scores = scores / 100
    positive = torch.where(scores > 0, scores, torch.inf)
    floor = (positive.amin(dim=1, keepdim=True) / 2).clamp(max=0.5)
    scores = torch.where(scores > 0, scores, scores + floor)  # NaN stays NaN
    if scale == "sigmoid":
        return torch.logit(torch.where(scores >= 1, 1 - 2**-25, scores))  # a float32 rounds this to 1
    return scores.log()
