"""What the coefficients mix: the token library."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenLibrary(nn.Module):
    """Learned vectors of the backbone's width, out of which prompts are mixed.

    Args:
        library_size: number of vectors, L.
        hidden_size: the backbone's width, D.
        initializer_range: standard deviation of the initial values. The official code uses 0.02; trained libraries
            grow far beyond it.

    Source: arXiv:2210.06466 and its official code.
    """

    def __init__(self, library_size: int, hidden_size: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(library_size, hidden_size).normal_(std=initializer_range))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Blend library tokens into one prompt per slot.

        Args:
            coefficients: (B, P, L), non-negative.

        Returns:
            (B, P, D) prompts.
        """
        return coefficients @ self.tokens

    def static_prompts(self, batch_size: int) -> Tensor:
        """Give every image all L tokens as they are: (B, L, D) prompts, the input-independent control."""
        return self.tokens.expand(batch_size, -1, -1)
