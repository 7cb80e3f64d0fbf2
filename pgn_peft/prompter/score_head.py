"""Heads that classify a task at the client, from a server's scores or embeddings: exact, or fitted to answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.heads import fit_ridge, held_out
from pgn_peft.prompter.answers import as_row, find_scale, log_scores, read_entries


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
        scale: what the server's scores are, see `find_scale`; None: found out for each answer.
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
        """Compute the task's logits (B, M) of a server's answers, each for one image; see `read_entries`."""
        return torch.stack([self.read_entries(read_entries(answer)) for answer in answers])

    def read_entries(self, entries: Sequence[tuple[str, float]]) -> Tensor:
        """Compute the task's logits (M,) of one answer's labels and scores.

        Raises:
            ValueError: the answer lacks a score that the head needs.
        """
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
    """Make a head that reads one of the server's classes, an index in `label_mapping`, for each of the task's."""
    weight = torch.zeros(len(label_mapping), len(server_labels))
    weight[torch.arange(len(label_mapping)), torch.tensor(label_mapping)] = 1
    return ScoreHead(weight, torch.zeros(len(weight)), server_labels, ScoreHeadReport("one-to-one"))


def exact_score_head(
    server_weight: Tensor,
    server_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor,
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
        head_bias: (M,), c.
        server_labels: names of the K classes. Those that share a name are left out: an answer cannot tell them apart.

    Raises:
        ValueError: the server's classes do not determine its features.
    """
    kept = [index for index, name in enumerate(server_labels) if server_labels.count(name) == 1]
    weight, head, bias = (part.detach().double().cpu() for part in (server_weight, head_weight, head_bias))
    weight = weight[kept] - weight[kept].mean(dim=0)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    # The weights were trained in float32: what is smaller than its rounding is noise.
    rank = int((singular > singular[:1] * max(weight.shape) * 2**-24).sum())
    if rank < weight.shape[1]:
        raise ValueError(
            f"The {weight.shape[1]} features of the server cannot be computed from the scores of {len(kept)} classes, "
            f"whose centred weights have rank {rank}. Fit a head to the server's answers: "
            "prompter.fit_answers(answers, labels)."
        )
    mapped = head @ (right.mT / singular) @ left.mT  # V pinv(Wc), (M, K')
    if server_bias is not None:
        own = server_bias.detach().double().cpu()[kept]
        bias = bias - mapped @ (own - own.mean())
    report = ScoreHeadReport("exact", rank=rank, condition_number=float(singular[0] / singular[-1]))
    return ScoreHead(mapped, bias, [server_labels[index] for index in kept], report)


class EmbeddingHead(nn.Linear):
    """A linear layer on embeddings of length 1. Services differ in whether they normalise; this head always does."""

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, M) of embeddings (B, D) of any length."""
        return super().forward(F.normalize(features, dim=-1))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Make a head with a weight (M, D) and a bias (M,), None: 0, on the CPU in float32."""
        head = cls(weight.shape[1], weight.shape[0])
        bias = torch.zeros(len(weight)) if bias is None else bias
        head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return head.requires_grad_(False).eval()


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
    table = ScoreTable.read(answers)
    classes = check_classes(labels, len(table.scores), num_labels)
    weight, bias, accuracy = fit_ridge(table.features, classes, num_labels)
    heads = [table.make_head("ridge", weight, bias, accuracy)]
    if table.probabilities is not None:
        weight, predicted = fit_label_mapping(table.probabilities, classes, num_labels)
        accuracy = float((predicted.argmax(1) == classes).double().mean())
        heads.append(table.make_head("mapping", weight, torch.zeros(num_labels), accuracy))
    return max(heads, key=lambda head: head.report.accuracy or 0.0)


@dataclass(frozen=True)
class ScoreTable:
    """A server's answers to several images.

    Args:
        labels: the K names of the classes in them.
        scores: (N, K) `log_scores`, NaN where a score is missing.
        scale: what the scores are, see `find_scale`.
        top_k: scores in an answer; None: each has those of all K classes.
    """

    labels: list[str]
    scores: Tensor
    scale: str
    top_k: int | None

    @classmethod
    def read(cls, answers: Iterable[Iterable[Any]]) -> ScoreTable:
        """Read answers, each for one image; see `read_entries`."""
        read = [read_entries(answer) for answer in answers]
        labels = sorted({label for entries in read for label, _ in entries})
        rows = torch.stack([as_row(entries, labels) for entries in read])
        present = ~rows.isnan()
        complete = bool(present.all())
        scale = find_scale([[score for _, score in entries] for entries in read], complete)
        return cls(labels, log_scores(rows, scale), scale, None if complete else int(present.sum(dim=1).max()))

    @property
    def features(self) -> Tensor:
        """What ridge regression reads: (N, K)."""
        return centred(self.scores)

    @property
    def probabilities(self) -> Tensor | None:
        """What label mapping reads: (N, K), 0 where a score is missing; None if the scores do not sum to 1."""
        return self.scores.exp().nan_to_num(nan=0.0) if self.scale in ("softmax", "percent") else None

    def make_head(self, kind: str, weight: Tensor, bias: Tensor, accuracy: float) -> ScoreHead:
        """Make a head with a weight (M, K) and a bias (M,) for such answers."""
        return ScoreHead(weight, bias, self.labels, ScoreHeadReport(kind, self.top_k, accuracy=accuracy), self.scale)


@dataclass(frozen=True)
class EmbeddingTable:
    """A server's embeddings of several images.

    Args:
        features: (N, D), of length 1, which is what ridge regression reads.
    """

    features: Tensor
    probabilities: None = None  # a mapping needs scores

    def make_head(self, kind: str, weight: Tensor, bias: Tensor, accuracy: float) -> EmbeddingHead:
        """Make a head with a weight (M, D) and a bias (M,), as `ScoreTable` does."""
        return EmbeddingHead.of(weight, bias)


def is_embedding(answer: Any) -> bool:
    """Whether an answer is an embedding, and not entries with `label` and `score`."""
    return isinstance(answer, Tensor) or isinstance(answer[0], (int, float))


def read_table(answers: Sequence[Any]) -> ScoreTable | EmbeddingTable:
    """Read answers to several images, all entries with `label` and `score` or all embeddings."""
    if not is_embedding(answers[0]):
        return ScoreTable.read(answers)
    embeddings = torch.stack([torch.as_tensor(answer, dtype=torch.float64) for answer in answers])
    return EmbeddingTable(F.normalize(embeddings, dim=-1))


def fit_label_mapping(probabilities: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Fit a Bayesian label mapping: a score of the task's class is the weighted sum of all scores.

    Args:
        probabilities: (N, K), 0 where an answer has no score.
        labels: (N,) 0..M-1.
        num_labels: M.

    Returns:
        The weights (M, K), rows of which sum to 1, and scores (N, M) of each image by weights of others.

    Source: BLM+ of Cai et al., "Bayesian-guided Label Mapping for Visual Reprogramming", NeurIPS 2024,
    arXiv:2410.24018; `blmpp_reweight_matrix` in `mapping.py` of the official code.
    """
    one_hot = F.one_hot(labels, num_labels).to(probabilities)  # (N, M)

    def weigh(rows: Tensor) -> Tensor:
        summed = one_hot[rows].mT @ probabilities[rows]  # (M, K)
        # P(task's class | server's class); the 1 makes rare ones weigh less.
        conditional = summed / (summed.sum(dim=0) + 1)
        return conditional / conditional.sum(dim=1, keepdim=True).clamp(min=1e-30)

    predicted = held_out(lambda rows, rest: probabilities[rest] @ weigh(rows).mT, labels)
    return weigh(torch.arange(len(labels))), predicted


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
    """Return the classes of `number` images as a tensor (N,).

    Raises:
        ValueError: there are more or fewer, a class is not one of 0..`num_labels`-1, or has less than `fewest` images.
    """
    classes = torch.as_tensor(labels).long().cpu()
    counts = classes[(classes >= 0) & (classes < num_labels)].bincount(minlength=num_labels)
    if classes.shape != (number,) or int(counts.sum()) < number or int(counts.min()) < fewest:
        raise ValueError(
            f"`labels` must give each of the {number} images a class from 0 to {num_labels - 1}, and each class at "
            f"least {fewest}, but there are {len(classes)} labels, {sorted(set(classes.tolist()))[:10]}."
        )
    return classes
