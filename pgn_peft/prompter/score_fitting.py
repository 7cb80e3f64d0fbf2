"""Fits a `ScoreHead` to a server's answers, for a server whose weights are not known or that gives few scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pgn_peft.nn.ridge import fit_ridge, held_out
from pgn_peft.prompter.answers import as_row, find_scale, log_scores, read_entries
from pgn_peft.prompter.score_head import ScoreHead, ScoreHeadReport, centred


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
        ValueError: a score is not a finite number, or can be a percentage as well as a logit; a class has fewer than
            two images, or a label is out of range.
    """
    read = [read_entries(answer) for answer in answers]
    classes = check_classes(labels, len(read), num_labels)
    names = sorted({label for entries in read for label, _ in entries})
    rows = torch.stack([as_row(entries, names) for entries in read])
    scale = find_scale([[score for _, score in entries] for entries in read], not bool(rows.isnan().any()))
    scores = log_scores(rows, scale)
    present = ~rows.isnan()
    top_k = None if bool(present.all()) else int(present.sum(dim=1).max())
    weight, bias, accuracy = fit_ridge(centred(scores), classes, num_labels)
    heads = [ScoreHead(weight, bias, names, ScoreHeadReport("ridge", top_k, accuracy=accuracy), scale)]
    if scale in ("softmax", "percent"):
        weight, accuracy = fit_label_mapping(scores.exp().nan_to_num(nan=0.0), classes, num_labels)
        report = ScoreHeadReport("mapping", top_k, accuracy=accuracy)
        heads.append(ScoreHead(weight, torch.zeros(num_labels), names, report, scale))
    return max(heads, key=lambda head: head.report.accuracy or 0.0)


def fit_label_mapping(
    probabilities: Tensor, labels: Tensor, num_labels: int, smoothing: float = 1.0
) -> tuple[Tensor, float]:
    """Fit a Bayesian label mapping: a score of the task's class is the weighted sum of all scores.

    Args:
        probabilities: (N, K), 0 where an answer has no score.
        labels: (N,) 0..M-1.
        num_labels: M.
        smoothing: added to the sum of each of the server's classes, so that rare ones weigh less.

    Returns:
        The weights (M, K), rows of which sum to 1, and the cross-validated accuracy.

    Source: BLM+ of Cai et al., "Bayesian-guided Label Mapping for Visual Reprogramming", NeurIPS 2024,
    arXiv:2410.24018; `blmpp_reweight_matrix` in `mapping.py` of the official code.
    """
    one_hot = F.one_hot(labels, num_labels).to(probabilities)  # (N, M)

    def weigh(rows: Tensor) -> Tensor:
        summed = one_hot[rows].mT @ probabilities[rows]  # (M, K)
        conditional = summed / (summed.sum(dim=0) + smoothing).clamp(min=1e-30)  # P(task's class | server's class)
        return conditional / conditional.sum(dim=1, keepdim=True).clamp(min=1e-30)

    predicted = held_out(lambda rows, rest: probabilities[rest] @ weigh(rows).mT, labels)
    return weigh(torch.arange(len(labels))), float((predicted.argmax(1) == labels).double().mean())


def frequency_mapping(
    logits: Tensor, labels: Tensor, num_labels: int, id2label: Mapping[int, str] | None = None
) -> list[int]:
    """Map each of a task's classes to a class of the model, by how often the model predicts it.

    The most frequent pair of task class and model class is fixed first, then the next of the remaining ones; where
    counts are equal, the mean probability decides. The mapping is one to one.

    Args:
        logits: (N, K), of the unmodified model for training images.
        labels: (N,) the images' classes, 0..`num_labels`-1.
        num_labels: number of the task's classes, at most K.
        id2label: the model's labels. Classes whose name another class has too are left out then, because a server
            answers with names (in ImageNet "crane" is a bird and a machine).

    Returns:
        For each of the task's classes the index of the model's, all different: `PGNConfig(label_mapping=...)`.

    Raises:
        ValueError: the model has fewer classes than the task, a label is out of range, or a class has no images.

    Source: the frequency-based mapping of visual prompting (Tsai et al. 2020; Chen et al. 2022).
    """
    classes = check_classes(labels, len(logits), num_labels, fewest=1).to(logits.device)
    names = range(logits.shape[1]) if id2label is None else [id2label[index] for index in range(len(id2label))]
    usable = [index for index, name in enumerate(names) if list(names).count(name) == 1]
    if num_labels > len(usable):
        raise ValueError(
            f"{num_labels} classes cannot be mapped one to one to a model's {len(usable)} classes with names of their "
            "own. Use a model with more classes, or head='trained'."
        )
    one_hot = F.one_hot(classes, num_labels).double()  # (N, M)
    predicted = F.one_hot(logits.argmax(dim=1), logits.shape[1]).double()
    mean_probability = one_hot.mT @ logits.double().softmax(dim=1) / one_hot.sum(dim=0)[:, None]
    votes = (one_hot.mT @ predicted + mean_probability)[:, usable]  # (M, usable classes)
    mapping = [0] * num_labels
    for _ in range(num_labels):
        label, column = divmod(int(votes.argmax()), len(usable))
        mapping[label] = usable[column]
        votes[label] = votes[:, column] = -1.0
    return mapping


def check_classes(labels: Sequence[int] | Tensor, number: int, num_labels: int, fewest: int = 2) -> Tensor:
    """Return class indices as a tensor (N,), if they suit N images and each class has some of them.

    Args:
        labels: the images' classes.
        number: N.
        num_labels: number of classes, M.
        fewest: images that each class must have.

    Raises:
        ValueError: they do not.
    """
    classes = torch.as_tensor(labels).long().cpu()
    counts = classes[(classes >= 0) & (classes < num_labels)].bincount(minlength=num_labels)
    if classes.shape != (number,) or int(counts.sum()) < number or int(counts.min()) < fewest:
        raise ValueError(
            f"`labels` must give each of the {number} images a class from 0 to {num_labels - 1}, and each class at "
            f"least {fewest}, but there are {len(classes)} labels, {sorted(set(classes.tolist()))[:10]}."
        )
    return classes
