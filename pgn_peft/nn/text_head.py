"""A classification head that compares an image with texts. Plain torch."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextHead(nn.Module):
    """Logits of images: scaled cosines of their embeddings to those of texts, one text for each class.

    The texts are no parameters: they stay as they are. Until `set_texts` or a file gives them, they are NaN.

    Args:
        embedding_size: of images and of texts, D.
        num_labels: number of texts, M.
        correction: also learn a matrix E (M, M), from zero, and answer logits @ (I + E).

    Attributes:
        is_set: whether there are texts that can be used; found out when they are loaded, or the mode is set.

    Source: CLIP, arXiv:2103.00020 (without E).
    """

    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, embedding_size: int, num_labels: int, correction: bool = False) -> None:
        super().__init__()
        self.register_buffer("text_embeds", torch.full((num_labels, embedding_size), math.nan))
        self.register_buffer("logit_scale", torch.ones(()))
        self.register_buffer("logit_bias", torch.zeros(()))
        self.correction = nn.Parameter(torch.zeros(num_labels, num_labels)) if correction else None
        self.is_set = False
        self.register_load_state_dict_post_hook(_look)

    @torch.no_grad()
    def set_texts(self, text_embeds: Tensor, logit_scale: float, logit_bias: float = 0.0) -> None:
        """Give the embeddings (M, D) of the texts, of any length, and the scale and bias of the cosines."""
        self.text_embeds.copy_(F.normalize(text_embeds.float(), dim=-1))
        self.logit_scale.fill_(logit_scale)
        self.logit_bias.fill_(logit_bias)
        self.is_set = True

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and look whether there are texts by now."""
        self.look()
        return super().train(mode)

    def look(self) -> bool:
        """Find out whether there are texts: embeddings of length 1, with a scale above 0."""
        if not self.text_embeds.is_meta:
            lengths = self.text_embeds.float().norm(dim=-1)
            rounding = 0.01  # of half precision
            usable = ((lengths - 1).abs() < rounding).all() & (self.logit_scale > 0)
            self.is_set = bool(usable & (self.logit_scale + self.logit_bias).isfinite())
        return self.is_set

    def zero_shot(self, features: Tensor) -> Tensor:
        """Compute the logits (B, M) of image embeddings (B, D) without the correction."""
        cosines = F.normalize(features.to(self.text_embeds.dtype), dim=-1) @ self.text_embeds.mT
        return self.logit_scale * cosines + self.logit_bias

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits (B, M) of image embeddings (B, D) of any length."""
        logits = self.zero_shot(features)
        return logits if self.correction is None else logits + logits @ self.correction

    def linear(self) -> tuple[Tensor, Tensor]:
        """Return weight (M, D) and bias (M,) of the same logits as a linear map of normalised embeddings."""
        weight, bias = self.logit_scale * self.text_embeds, self.logit_bias.expand(len(self.text_embeds))
        if self.correction is None:
            return weight, bias
        corrected = torch.eye(len(bias), device=bias.device, dtype=bias.dtype) + self.correction
        return corrected.mT @ weight, bias @ corrected


def _look(head: TextHead, incompatible_keys: Any) -> None:
    head.look()
