"""Libraries that prompts are mixed from: of tokens, or of changes of pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenLibrary(nn.Module):
    """Learned vectors of the backbone's width, from which prompts are mixed.

    Args:
        library_size: number of vectors, L.
        hidden_size: the backbone's width, D.
        initializer_range: standard deviation of the initial values. The official code uses 0.02; trained libraries
            grow far beyond it.
        num_slots: number P of slots with a learned static prompt, to which the mixture is added; None: the mixture is
            the prompt, as in the paper.
        depth: number of encoder layers with prompts of their own. If there are several, each has its own vectors and
            slots and all share the coefficients: (depth, L, D) and (depth, P, D) instead of (L, D) and (P, D).
        first_layer_only: start the vectors and slots of later layers from zero.

    Source: arXiv:2210.06466 and its official code, for a depth of 1; Jia et al. 2022 (arXiv:2203.12119) for prompts in
    every layer.
    """

    def __init__(
        self,
        library_size: int,
        hidden_size: int,
        initializer_range: float = 0.02,
        num_slots: int | None = None,
        depth: int = 1,
        first_layer_only: bool = False,
    ) -> None:
        super().__init__()
        layers = () if depth == 1 else (depth,)
        shape = (*layers, library_size, hidden_size)
        self.tokens = nn.Parameter(torch.empty(shape).normal_(std=initializer_range))
        # The static prompts. Saved adapters have this name for them.
        self.slot_prompts: nn.Parameter | None = None
        if num_slots is not None:
            shape = (*layers, num_slots, hidden_size)
            self.slot_prompts = nn.Parameter(torch.empty(shape).normal_(std=initializer_range))
        for parameter in self.parameters() if first_layer_only else ():
            nn.init.zeros_(parameter[1:])

    def forward(self, coefficients: Tensor) -> Tensor:
        """Blend library tokens into one prompt per slot.

        Args:
            coefficients: (B, P, L), non-negative.

        Returns:
            (B, depth * P, D) prompts, layer by layer.
        """
        tokens = self.tokens.view(-1, *self.tokens.shape[-2:])  # (depth, L, D)
        prompts = coefficients @ tokens.transpose(0, 1).flatten(1)  # (B, P, depth * D): one product for all layers
        prompts = prompts.unflatten(-1, (len(tokens), -1)).transpose(1, 2)  # (B, depth, P, D)
        return (prompts if self.slot_prompts is None else prompts + self.slot_prompts).flatten(1, 2)

    def all_entries(self, batch_size: int) -> Tensor:
        """Return all tokens as the prompts of every image: (B, depth * L, D), the input-independent control."""
        return self.tokens.view(-1, self.tokens.shape[-1]).expand(batch_size, -1, -1)


class AdditiveLibrary(nn.Module):
    """Learned changes of a patch, mixtures of which are added to the patches of an image.

    Each is the shift of the token that the backbone computes from a patch, and reaches the pixels through the inverse
    of the patch projection: a training step moves the token equally far in every direction. All start at zero, so that
    the adapted model starts as the frozen one.

    Args:
        library_size: number of changes, L.
        hidden_size: the backbone's width, D.
        directions: (C, p, p, D) change of a patch's pixels that shifts its token by one, along each of D axes.

    Differs from the paper, which appends prompts to the tokens.
    """

    directions: Tensor

    def __init__(self, library_size: int, hidden_size: int, directions: Tensor | None = None) -> None:
        super().__init__()
        self.token_shifts = nn.Parameter(torch.zeros(library_size, hidden_size))
        # Computed from the frozen backbone, so it is not saved.
        self.register_buffer("directions", directions, persistent=False)

    @property
    def patches(self) -> Tensor:
        """The library: (L, C, p, p), changes of pixels in [0, 1]."""
        # Always computed in float32, while the parameters may have been cast.
        directions = self.directions.to(self.token_shifts.dtype)
        return (self.token_shifts @ directions.flatten(0, 2).mT).unflatten(-1, directions.shape[:3])

    def forward(self, coefficients: Tensor) -> Tensor:
        """Blend changes into one per patch: from (B, P, L) to (B, P, C, p, p)."""
        patches = self.patches
        return (coefficients @ patches.flatten(1)).unflatten(-1, patches.shape[1:])

    def all_entries(self, batch_size: int) -> Tensor:
        """Return all L changes for every image: (B, L, C, p, p); with L = 1 the input-independent control."""
        return self.patches.expand(batch_size, -1, -1, -1, -1)
