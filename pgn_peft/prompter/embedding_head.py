"""A head on embeddings, for a service that returns these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.ridge import fit_ridge
from pgn_peft.prompter.score_fitting import check_classes


class EmbeddingHead(nn.Linear):
    """A linear layer on embeddings of length 1. Services differ in whether they normalise; this head always does."""

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, M) of embeddings (B, D) of any length."""
        return super().forward(F.normalize(features, dim=-1))


def text_head(text_embeds: Tensor, logit_scale: float = 100.0) -> EmbeddingHead:
    """Make the head of CLIP's zero-shot classification: the cosines to the texts, scaled.

    Args:
        text_embeds: (M, D), of any length.
        logit_scale: of the cosines; CLIP's `logit_scale.exp()`.
    """
    return make_embedding_head(
        logit_scale * F.normalize(text_embeds.detach().float().cpu(), dim=-1), torch.zeros(len(text_embeds))
    )


def fit_embedding_head(
    embeddings: Tensor, labels: Sequence[int] | Tensor, num_labels: int
) -> tuple[EmbeddingHead, float]:
    """Fit a head to a service's embeddings by ridge regression; see `fit_ridge`.

    Args:
        embeddings: (N, D), of any length.
        labels: (N,) 0..M-1.
        num_labels: M.

    Returns:
        The head and its cross-validated accuracy.
    """
    classes = check_classes(labels, len(embeddings), num_labels)
    weight, bias, accuracy = fit_ridge(F.normalize(embeddings.double().cpu(), dim=-1), classes, num_labels)
    return make_embedding_head(weight, bias), accuracy


def make_embedding_head(weight: Tensor, bias: Tensor) -> EmbeddingHead:
    """Make the head with a weight (M, D) and a bias (M,)."""
    head = EmbeddingHead(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head.requires_grad_(False).eval()
