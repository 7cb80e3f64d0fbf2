"""Libraries that prompts are mixed from: of tokens, or of patches of pixels."""

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
    ) -> None:
        super().__init__()
        layers = () if depth == 1 else (depth,)
        shape = (*layers, library_size, hidden_size)
        self.tokens = nn.Parameter(torch.empty(shape).normal_(std=initializer_range))
        self.slot_prompts: nn.Parameter | None = None
        if num_slots is not None:
            shape = (*layers, num_slots, hidden_size)
            self.slot_prompts = nn.Parameter(torch.empty(shape).normal_(std=initializer_range))

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

    def static_prompts(self, batch_size: int) -> Tensor:
        """Return all tokens as the prompts of every image: (B, depth * L, D), the input-independent control."""
        return self.tokens.view(-1, self.tokens.shape[-1]).expand(batch_size, -1, -1)


class PatchLibrary(nn.Module):
    """Learned patches of valid pixels, from which prompts are mixed.

    Pixels are the sigmoid of free parameters, so that they and their softmax mixtures always lie in [0, 1]. Each patch
    has two parameters: the logits of its pixels, and a shift of the token that the backbone computes from it. A
    training step of the shift moves the token equally far in every direction, as in a token library; a step of the
    logits moves it hundreds of times further in some directions than in others.

    Args:
        library_size: number of patches, L.
        num_channels: channels C of the images.
        patch_size: side p of the backbone's patches, in pixels.
        hidden_size: the backbone's width D.
        initializer_range: standard deviation of the initial pixels' logits, around grey. `start_from_images` is
            better.
        directions: (C, p, p, D) change of a patch's pixels that shifts its token by one, along each of D axes.
        image_offset: also learn one patch (C, p, p) that is added to each of the image's own, from zeros.

    Differs from the paper, which trains tokens and turns them into pixels afterwards.
    """

    directions: Tensor

    def __init__(
        self,
        library_size: int,
        num_channels: int,
        patch_size: int,
        hidden_size: int,
        initializer_range: float = 0.02,
        directions: Tensor | None = None,
        image_offset: bool = False,
    ) -> None:
        super().__init__()
        shape = (library_size, num_channels, patch_size, patch_size)
        self.patch_logits = nn.Parameter(torch.empty(shape).normal_(std=initializer_range))
        self.token_shifts = nn.Parameter(torch.zeros(library_size, hidden_size))
        self.image_offset = nn.Parameter(torch.zeros(shape[1:])) if image_offset else None
        # Computed from the frozen backbone, so it is not saved.
        self.register_buffer("directions", directions, persistent=False)

    @property
    def patches(self) -> Tensor:
        """The library: (L, C, p, p) in [0, 1]."""
        # Always computed in float32, while the parameters may have been cast.
        directions = self.directions.to(self.token_shifts.dtype)
        shifts = self.token_shifts @ directions.flatten(0, 2).mT  # (L, C * p * p)
        slope = 0.25  # of the sigmoid at grey: from pixels to their logits
        return (self.patch_logits + shifts.view_as(self.patch_logits) / slope).sigmoid()

    def forward(self, coefficients: Tensor) -> Tensor:
        """Blend library patches into one prompt per slot.

        Args:
            coefficients: (B, P, L), non-negative, with sum 1 over L.

        Returns:
            (B, P, C, p, p) prompts in [0, 1].
        """
        patches = self.patches
        return (coefficients @ patches.flatten(1)).unflatten(-1, patches.shape[1:])

    def static_prompts(self, batch_size: int) -> Tensor:
        """Return all L patches as the prompts of every image: (B, L, C, p, p), the input-independent control."""
        return self.patches.expand(batch_size, -1, -1, -1, -1)

    @torch.no_grad()
    def start_from_images(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Replace the library by patches cut out of images, at random places.

        Args:
            images: (B, C, H, W) in [0, 1], at least as large as a patch.
            generator: source of the random choice.
        """
        library_size, _, side, _ = self.patch_logits.shape
        largest = torch.tensor([images.shape[0], images.shape[2] - side + 1, images.shape[3] - side + 1])
        places = (torch.rand(library_size, 3, generator=generator) * largest).long().tolist()
        cut = torch.stack([images[image, :, top : top + side, left : left + side] for image, top, left in places])
        # The logits of black and white are infinite; at 0.02 and 0.98 the sigmoid still has a gradient.
        self.patch_logits.copy_(cut.clamp(0.02, 0.98).logit())
        self.token_shifts.zero_()


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
    image_offset = None

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

    def static_prompts(self, batch_size: int) -> Tensor:
        """Return all L changes for every image: (B, L, C, p, p); with L = 1 the input-independent control."""
        return self.patches.expand(batch_size, -1, -1, -1, -1)
