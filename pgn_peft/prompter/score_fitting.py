"""Fits heads to a server's answers, where its weights are not known or its answers lack what an exact head needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pgn_peft.nn.ridge import fit_ridge, held_out
from pgn_peft.prompter.answers import read_entries
from pgn_peft.prompter.score_head import ScoreHead, ScoreHeadReport, as_row, centred, needed_digits
from pgn_peft.prompter.score_scale import find_scale, log_scores


def fit_to_answers(answers: Iterable[Iterable[Any]], labels: Sequence[int] | Tensor, num_labels: int) -> ScoreHead:
    """Fit a head to a server's answers, by ridge regression or Bayesian label mapping, whichever is more accurate.

    Args:
        answers: one for each image: entries with `label` and `score`.
        labels: the images' classes, 0..`num_labels`-1.
        num_labels: number of the task's classes.

    Returns:
        The head that is right more often in cross-validation; `report` has its kind and accuracy.

    Raises:
        TypeError: an answer is not a list of entries with `label` and `score`.
        ValueError: an answer is empty, a class has fewer than two images, or a label is out of range.
    """
    read = [read_entries(answer) for answer in answers]
    names = sorted({label for entries in read for label, _ in entries})
    if not all(read) or not read:
        raise ValueError(
            "`answers` must hold scores for every image, but got none. Pass on all that the server answered."
        )
    rows = torch.stack([as_row(entries, names) for entries in read])
    complete = not bool(rows.isnan().any())
    scale = find_scale([[score for _, score in entries] for entries in read], complete)
    scores, classes = log_scores(rows, scale), check_classes(labels, len(rows), num_labels)
    heads = [fit_score_head(scores, classes, num_labels, names, scale)]
    if scale in ("softmax", "percent"):
        heads.append(fit_label_mapping(scores, classes, num_labels, names))
    return max(heads, key=lambda head: head.report.accuracy or 0.0)


def fit_score_head(scores: Tensor, labels: Tensor, num_labels: int, names: Sequence[str], scale: str) -> ScoreHead:
    """Fit a linear head on centred log-scores; see `fit_ridge`.

    Args:
        scores: (N, K) `log_scores`, NaN where one is missing; it counts as half the smallest.
        labels: (N,) 0..M-1.
        num_labels: M.
        names: of the server's K classes.
        scale: what the server's scores are, one of `SCALES`.
    """
    weight, bias, accuracy = fit_ridge(centred(scores), labels, num_labels)
    report = ScoreHeadReport("ridge", _top_k(scores), needed_digits(weight), accuracy=accuracy)
    return ScoreHead(weight, bias, names, report, scale)


def fit_label_mapping(
    scores: Tensor, labels: Tensor, num_labels: int, names: Sequence[str], smoothing: float = 1.0
) -> ScoreHead:
    """Fit a Bayesian label mapping: a score of the task's class is the sum of all scores, weighted.

    Args:
        scores: (N, K) `log_scores` of probabilities, NaN where one is missing; it counts as probability 0.
        labels: (N,) 0..M-1.
        num_labels: M.
        names: of the server's K classes.
        smoothing: added to the sum of each of the server's classes, so that rare ones weigh less.

    Source: BLM+ of Cai et al., "Bayesian-guided Label Mapping for Visual Reprogramming", NeurIPS 2024,
    arXiv:2410.24018; `blmpp_reweight_matrix` in `mapping.py` of the official code.
    """
    probabilities = scores.double().exp().nan_to_num(nan=0.0)

    def weigh(rows: Tensor) -> Tensor:
        return mapping_matrix(probabilities[rows], labels[rows], num_labels, smoothing)

    predicted = held_out(lambda rows, rest: probabilities[rest] @ weigh(rows).mT, labels)
    accuracy = float((predicted.argmax(1) == labels).double().mean())
    report = ScoreHeadReport("mapping", _top_k(scores), accuracy=accuracy)
    return ScoreHead(weigh(torch.arange(len(labels))), torch.zeros(num_labels), names, report, "softmax")


def mapping_matrix(probabilities: Tensor, labels: Tensor, num_labels: int, smoothing: float) -> Tensor:
    """Estimate the share of each of the server's classes in each of the task's.

    Args:
        probabilities: (N, K), 0 where an answer has no score.
        labels: (N,).
        num_labels: M.
        smoothing: added to the sum over each of the server's classes.

    Returns:
        (M, K), the rows of which sum to 1: P(task's class | server's class), normalised over the server's classes.
    """
    summed = F.one_hot(labels, num_labels).to(probabilities).mT @ probabilities  # (M, K)
    conditional = summed / (summed.sum(dim=0) + smoothing).clamp(min=1e-30)
    return conditional / conditional.sum(dim=1, keepdim=True).clamp(min=1e-30)


def check_classes(labels: Sequence[int] | Tensor, number: int, num_labels: int) -> Tensor:
    """Return class indices as a tensor (N,), if they suit N images and each class has two at least.

    Raises:
        ValueError: they do not.
    """
    classes = torch.as_tensor(labels).long().cpu()
    if classes.shape != (number,):
        raise ValueError(
            f"`labels` must hold one class for each of {number} images, but got {tuple(classes.shape)}. Pass both in "
            "the same order."
        )
    counts = classes[(classes >= 0) & (classes < num_labels)].bincount(minlength=num_labels)
    if int(counts.sum()) < number or int(counts.min()) < 2:
        raise ValueError(
            f"`labels` must hold each of the classes 0..{num_labels - 1} twice at least, but got "
            f"{sorted(classes.tolist())[:10]}. Give images of every class."
        )
    return classes


def _top_k(scores: Tensor) -> int | None:
    """Return how many scores (N, K) an answer has at most; None if no answer lacks one."""
    present = ~scores.isnan()
    return None if bool(present.all()) else int(present.sum(dim=1).max())
