"""`ScoreHead`: classifies a task from the scores that a closed model gives to its own classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.prompter.answers import by_label, read_entries
from pgn_peft.prompter.score_scale import find_scale, log_scores

KINDS = ("exact", "ridge", "mapping")

# The largest error of a logit that is no matter: it changes the odds of two classes by a fifth.
LOGIT_TOLERANCE = 0.1


@dataclass(frozen=True)
class ScoreHeadReport:
    """How a `ScoreHead` was made, and what it needs.

    Args:
        kind: "exact": a trained head, taken through the inverse of the server's head; "ridge": fitted on answers by
            ridge regression on log-scores; "mapping": Bayesian label mapping of answers.
        top_k: how many of the best scores it reads; None: it needs the scores of all classes.
        digits: significant decimal digits of the scores with which no logit is wrong by more than 0.1, if all
            roundings add up. Usually one less is enough; see `ImagePrompter.describe_answer`. None for a mapping.
        rank: rank of the server's centred head; None if the head was fitted.
        condition_number: its largest over its smallest singular value; None if the head was fitted.
        accuracy: cross-validated, on the answers that the head was fitted on; None for an exact one.
    """

    kind: str
    top_k: int | None = None
    digits: int | None = None
    rank: int | None = None
    condition_number: float | None = None
    accuracy: float | None = None


class ScoreHead(nn.Module):
    """An affine map of centred log-scores to logits of the task, or a weighted sum of scores.

    Args:
        weight: (M, K).
        bias: (M,); not used by a mapping.
        labels: the K names of the server's classes that are read.
        report: how it was made. `kind` and `top_k` decide what `forward` does.
        scale: what the server's scores are, one of `SCALES`; None: found out for each answer.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, labels: Sequence[str], report: ScoreHeadReport, scale: str | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.labels = list(labels)
        self.report = report
        self.scale = scale

    def forward(self, scores: Tensor) -> Tensor:
        """Compute the task's logits.

        Args:
            scores: (B, K) `log_scores`, NaN where a score is missing.

        Returns:
            (B, M) float64. For a mapping, the logarithms of the task's scores.

        Raises:
            ValueError: a score is missing that the head needs.
        """
        scores = scores.double()
        missing = scores.isnan()
        if self.report.top_k is None and bool(missing.any()):
            raise ValueError(
                f"`answer` must hold the scores of all classes, but got none for {int(missing.any(0).sum())} of "
                f"{len(self.labels)}. Ask the server for all its labels (top_k={len(self.labels)} or more). If it "
                "gives only its best ones, fit a head to such answers: prompter.fit_answers(answers, labels)."
            )
        weight = self.weight.double()
        if self.report.kind == "mapping":
            # The best classes of an image can all be new: the task's classes are equal then.
            return (scores.exp().nan_to_num(nan=0.0) @ weight.mT).clamp(min=1e-30).log()
        return centred(scores) @ weight.mT + self.bias.double()

    def read(self, answers: Iterable[Iterable[Any]]) -> Tensor:
        """Compute the task's logits (B, M) of a server's answers, each for one image.

        Raises:
            TypeError: an answer is not a list of entries with `label` and `score`.
            ValueError: an answer lacks a score that the head needs.
        """
        return torch.stack([self.read_entries(read_entries(answer)) for answer in answers])

    def read_entries(self, entries: Sequence[tuple[str, float]]) -> Tensor:
        """Compute the task's logits (M,) of one answer's labels and scores."""
        if self.report.top_k is not None:
            entries = sorted(entries, key=lambda entry: -entry[1])[: self.report.top_k]
        row = as_row(entries, self.labels)
        if not entries or (self.report.top_k is None and bool(row.isnan().all())):
            raise ValueError(
                f"`answer` must hold labels that the head was made for, like {self.labels[0]!r}, but got "
                f"{', '.join(repr(label) for label, _ in entries[:5]) or 'none'}. The server runs another model; fit "
                "a head to its answers: prompter.fit_answers(answers, labels)."
            )
        scale = self.scale or find_scale([[score for _, score in entries]], not bool(row.isnan().any()))
        return self(log_scores(row[None], scale).to(self.weight.device))[0]


def as_row(entries: Sequence[tuple[str, float]], labels: Sequence[str]) -> Tensor:
    """Order an answer's scores: (K,) float64 by `labels`, NaN where one is missing."""
    scores = by_label(entries)
    return torch.tensor([scores.get(label, math.nan) for label in labels], dtype=torch.float64)


def centred(scores: Tensor) -> Tensor:
    """Subtract each answer's mean from its log-scores (B, K). A missing score (NaN) counts as half of the smallest."""
    smallest = scores.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    scores = torch.where(scores.isnan(), smallest - math.log(2), scores)
    return scores - scores.mean(dim=1, keepdim=True)


def needed_digits(weight: Tensor) -> int:
    """Return how many significant digits scores need for logits (B, M) = log-scores @ weight (M, K)^T + bias.

    Rounding to s digits changes the logarithm of a score by at most 10^(1 - s) / 2, and a logit by this times the sum
    of its absolute weights. The centring of log-scores does not add to it, where the rows of the weight sum to 0.
    """
    amplification = float(weight.double().abs().sum(dim=1).max())
    return max(1, math.ceil(1 + math.log10(max(amplification, 1e-30) / 2 / LOGIT_TOLERANCE)))


def exact_score_head(
    server_weight: Tensor,
    server_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    server_labels: Sequence[str],
) -> ScoreHead:
    """Make a head on features a head on the scores of a server with the same features.

    With the server's logits W h + b, its log-scores are these up to one number, and centred over the classes they are
    Wc h + bc. If Wc has rank D, the features are h = pinv(Wc) (log-scores - bc), and the head V h + c is an affine map
    of the log-scores: exactly, but for their rounding.

    Args:
        server_weight: (K, D), W.
        server_bias: (K,), b; None: 0.
        head_weight: (M, D), V.
        head_bias: (M,), c; None: 0.
        server_labels: names of the K classes. Classes that share a name are left out: an answer does not tell them
            apart.

    Raises:
        ValueError: the server's classes do not determine its features.
    """
    names = list(server_labels)
    kept = [index for index, name in enumerate(names) if names.count(name) == 1]
    weight, head = server_weight.detach().double().cpu()[kept], head_weight.detach().double().cpu()
    width = weight.shape[1]
    weight = weight - weight.mean(dim=0) if kept else weight
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    # The weights were trained in float32: what is smaller than its rounding is noise.
    rank = int((singular > singular.amax() * max(weight.shape) * 2**-24).sum()) if kept else 0
    if rank < width:
        raise ValueError(
            f"`server_weight` must have rank {width}, the width of the features, once it is centred over its "
            f"{len(kept)} classes, but got {rank}. Fit a head to the server's answers: "
            "prompter.fit_answers(answers, labels)."
        )
    mapped = head @ (right.mT / singular) @ left.mT  # V pinv(Wc), (M, K')
    bias = torch.zeros(len(head)).double() if head_bias is None else head_bias.detach().double().cpu()
    if server_bias is not None:
        own = server_bias.detach().double().cpu()[kept]
        bias = bias - mapped @ (own - own.mean())
    report = ScoreHeadReport(
        "exact", None, needed_digits(mapped), rank, condition_number=float(singular[0] / singular[-1])
    )
    return ScoreHead(mapped, bias, [names[index] for index in kept], report)
