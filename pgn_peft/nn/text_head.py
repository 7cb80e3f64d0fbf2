"""A classification head that compares an image with texts. Plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextHead(nn.Module):
    """Logits of images: scaled cosines of their embeddings to those of texts, one text for each class.

    The texts are not trained. They are NaN until `set_texts` or a file gives them.

    Args:
        embedding_size: of images and of texts, D.
        num_labels: number of texts, M.

    Source: CLIP, arXiv:2103.00020.
    """

    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, embedding_size: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("text_embeds", torch.full((num_labels, embedding_size), math.nan))
        self.register_buffer("logit_scale", torch.ones(()))
        self.register_buffer("logit_bias", torch.zeros(()))
        self._has_texts = False

    @property
    def is_set(self) -> bool:
        """Whether there are texts. Always True while a graph is compiled, which cannot depend on values."""
        if not self._has_texts and not torch.compiler.is_compiling() and not self.text_embeds.is_meta:
            self._has_texts = not bool(self.text_embeds.isnan().any())  # asked once: a GPU has to wait for the answer
        return self._has_texts or torch.compiler.is_compiling()

    @torch.no_grad()
    def set_texts(self, text_embeds: Tensor, logit_scale: float, logit_bias: float = 0.0) -> None:
        """Give the embeddings (M, D) of the texts, of any length, and the scale and bias of the cosines."""
        self.text_embeds.copy_(F.normalize(text_embeds.float(), dim=-1))
        self.logit_scale.fill_(logit_scale)
        self.logit_bias.fill_(logit_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits (B, M) of image embeddings (B, D) of any length."""
        return F.linear(F.normalize(features.to(self.text_embeds.dtype), dim=-1), *self.linear())

    def linear(self) -> tuple[Tensor, Tensor]:
        """Return weight (M, D) and bias (M,) of the same logits as a linear map of normalised embeddings."""
        return self.logit_scale * self.text_embeds, self.logit_bias.expand(len(self.text_embeds))
