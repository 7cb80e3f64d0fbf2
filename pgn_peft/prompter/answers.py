"""Reading of a server's answers: scores of the task's classes, and a check that images arrive unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Of the largest score. Half precision moves a score of the probe by 0.02 of it, JPEG of quality 95 by 1.7, a resize by
# more than 1 (measured on DeiT-Tiny).
PROBE_TOLERANCE = 0.25


def read_entries(answer: Iterable[Any]) -> list[tuple[str, float]]:
    """Return the labels and scores in an answer. Two classes of a server can have the same label.

    Args:
        answer: entries with `label` and `score`, as dictionaries or as objects, from a pipeline or an endpoint.

    Raises:
        TypeError: `answer` is not a list of entries with `label` and `score`.
        ValueError: a score is not a finite number.
    """
    try:
        entries = [(str(_get(entry, "label")), _get(entry, "score")) for entry in answer]
        return [(label, _to_number(label, score)) for label, score in entries]
    except (TypeError, KeyError, AttributeError) as error:
        raise TypeError(
            f"`answer` must be a list of entries with `label` and `score`, but got {answer!r}. Pass on what the "
            "server answered for one image."
        ) from error


def _to_number(label: str, score: Any) -> float:
    try:
        number = float(score)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"The score of {label!r} is {score!r}. Pass finite numbers, and percentages without a sign.")
    return number


def by_label(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return scores by label; the larger one, where two classes have the same label."""
    scores: dict[str, float] = {}
    for label, score in entries:
        scores[label] = max(score, scores.get(label, score))
    return scores


def _get(entry: Any, name: str) -> Any:
    return entry[name] if isinstance(entry, Mapping) else getattr(entry, name)


def map_scores(
    scores: Mapping[str, float],
    id2label: Mapping[int, str],
    label_mapping: Sequence[int],
    server_labels: Mapping[int, str],
) -> dict[str, float]:
    """Convert scores of the server's classes to scores of the task's.

    Args:
        scores: by the server's labels.
        id2label: names of the task's classes by index.
        label_mapping: for each of them the index of the server's class.
        server_labels: names of the server's classes by index.

    Returns:
        Scores by the task's labels, normalised to sum 1. If the answer lacks some of them, the other scores are
        returned as they are: the best label is known then, its probability is not.

    Raises:
        ValueError: `scores` has none of the classes that the task is mapped to.
    """
    names = [server_labels[index] for index in label_mapping]
    found = {id2label[task]: scores[name] for task, name in enumerate(names) if name in scores}
    if not found:
        raise ValueError(
            f"`answer` must hold labels that the task is mapped to, like {names[0]!r}, but got "
            f"{', '.join(map(repr, list(scores)[:5]))}. Ask the server for all its labels: top_k={len(server_labels)}."
        )
    total = sum(found.values())
    if len(found) < len(names) or not 0 < total < float("inf"):
        return found
    return {label: score / total for label, score in found.items()}


def compare_with_probe(
    scores: Mapping[str, float], probe_scores: Sequence[float], server_labels: Mapping[int, str]
) -> float:
    """Compare a server's answer to the probe with the unmodified model's scores.

    Args:
        scores: the server's, by label.
        probe_scores: the model's, by class index.
        server_labels: names of the classes by index.

    Returns:
        The largest difference, as a share of the model's largest score.

    Raises:
        ValueError: `scores` has other labels, or differs by more than rounding.
    """
    expected: dict[str, float] = {}
    for index, score in enumerate(probe_scores):
        name = server_labels[index]
        expected[name] = max(score, expected.get(name, 0.0))  # as `by_label` reads the answer
    unknown = [label for label in scores if label not in expected]
    if unknown or not scores:
        raise ValueError(
            f"`answer` must hold the model's labels, but got {', '.join(map(repr, unknown[:3])) or 'none'}. The "
            "server runs another model, or gives its classes other names."
        )
    difference = max(abs(score - expected[label]) for label, score in scores.items()) / max(expected.values())
    if not difference <= PROBE_TOLERANCE:
        raise ValueError(
            f"`answer` must be the model's answer to the probe, but got scores that differ by {difference:.0%} of the "
            "largest. The server resizes, crops or re-encodes what it is sent (as JPEG?), or runs another model; "
            "images must reach the model pixel by pixel."
        )
    return difference
