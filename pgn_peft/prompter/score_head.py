"""Heads that classify a task at the client: from the scores that a server gives to its own classes, or embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.prompter.answers import as_row, find_scale, log_scores, read_entries

KINDS = ("exact", "ridge", "mapping", "one-to-one")


@dataclass(frozen=True)
class ScoreHeadReport:
    """How a `ScoreHead` was made, and what it needs.

    Args:
        kind: "exact": computed from a trained head and the server's; "ridge": fitted to answers by ridge regression on
            log-scores; "mapping": Bayesian label mapping, fitted to answers; "one-to-one": one of the server's classes
            for each of the task's.
        top_k: how many of the best scores it reads; None: the scores of all classes, which all kinds but "one-to-one"
            need then.
        rank: rank of the server's centred head; None if the head was fitted.
        condition_number: its largest over its smallest singular value; None if the head was fitted.
        accuracy: cross-validated, on the answers that the head was fitted to; None if it was not fitted.
    """

    kind: str
    top_k: int | None = None
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
        """
        weight = self.weight.double()
        if self.report.kind in ("mapping", "one-to-one"):
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
        read = self.weight.ne(0).any(dim=0).cpu()
        missing = row[read].isnan()
        if self.report.top_k is None and bool(missing.all() if self.report.kind == "one-to-one" else missing.any()):
            raise ValueError(
                f"The answer has {len(entries)} labels, such as {[label for label, _ in entries[:3]]}, and lacks "
                f"{int(missing.sum())} of the {len(missing)} that are read, such as "
                f"{self.labels[int((read & row.isnan()).nonzero()[0])]!r}. Ask the server for all of its labels "
                f"(top_k={len(self.labels)} or more). If it gives only its best ones, or runs another model, fit a "
                "head to its answers: prompter.fit_answers(answers, labels)."
            )
        scale = self.scale or find_scale([[score for _, score in entries]], not bool(row.isnan().any()))
        return self(log_scores(row[None], scale).to(self.weight.device))[0]


def centred(scores: Tensor) -> Tensor:
    """Subtract each answer's mean from its log-scores (B, K). A missing score (NaN) counts as half of the smallest."""
    smallest = scores.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    scores = torch.where(scores.isnan(), smallest - math.log(2), scores)
    return scores - scores.mean(dim=1, keepdim=True)


def one_to_one_head(label_mapping: Sequence[int], server_labels: Sequence[str]) -> ScoreHead:
    """Make a head that reads one of the server's classes for each of the task's, and leaves the others out.

    Args:
        label_mapping: for each of the task's classes the index of the server's; see `frequency_mapping`.
        server_labels: names of the server's classes.
    """
    weight = torch.zeros(len(label_mapping), len(server_labels))
    weight[torch.arange(len(label_mapping)), torch.tensor(label_mapping)] = 1
    return ScoreHead(weight, torch.zeros(len(weight)), server_labels, ScoreHeadReport("one-to-one"))


def exact_score_head(
    server_weight: Tensor,
    server_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    server_labels: Sequence[str],
) -> ScoreHead:
    """Convert a head on features into a head on the scores of a server with the same features.

    With the server's logits W h + b, its log-scores are these up to one number, and centred over the classes they are
    Wc h + bc. If Wc has rank D, the features are h = pinv(Wc) (log-scores - bc), and the head V h + c is an affine map
    of the log-scores: exactly, except for their rounding.

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
            f"The {width} features of the server cannot be computed from the scores of {len(kept)} classes, whose "
            f"centred weights have rank {rank}. Fit a head to the server's answers: prompter.fit_answers(answers, "
            "labels)."
        )
    mapped = head @ (right.mT / singular) @ left.mT  # V pinv(Wc), (M, K')
    bias = torch.zeros(len(head)).double() if head_bias is None else head_bias.detach().double().cpu()
    if server_bias is not None:
        own = server_bias.detach().double().cpu()[kept]
        bias = bias - mapped @ (own - own.mean())
    report = ScoreHeadReport("exact", rank=rank, condition_number=float(singular[0] / singular[-1]))
    return ScoreHead(mapped, bias, [names[index] for index in kept], report)


class EmbeddingHead(nn.Linear):
    """A linear layer on embeddings of length 1. Services differ in whether they normalise; this head always does."""

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, M) of embeddings (B, D) of any length."""
        return super().forward(F.normalize(features, dim=-1))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Make a head with a weight (M, D) and a bias (M,), on the CPU in float32."""
        head = cls(weight.shape[1], weight.shape[0])
        zeros = torch.zeros(len(weight))
        head.load_state_dict({"weight": weight.detach().cpu(), "bias": zeros if bias is None else bias.detach().cpu()})
        return head.requires_grad_(False).eval()
