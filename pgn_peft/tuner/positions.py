"""Interpolation of position embeddings: whether a backbone does it, and with which option."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pgn_peft.tuner.backbones import own_image_size, patch_projection, takes_any_size


def fixed_size(embeddings: nn.Module) -> tuple[int, int] | None:
    """Return height and width, in pixels, of the images that embeddings take without an option; None: any."""
    return None if takes_any_size(embeddings) else own_image_size(embeddings)


def size_options(fixed: tuple[int, int] | None, size: tuple[int, int]) -> dict[str, bool]:
    """Return the options that a model must be called with for images of some size.

    Args:
        fixed: the `fixed_size` of its embeddings.
        size: height and width of the images, in pixels.
    """
    return {} if fixed in (None, tuple(size)) else {"interpolate_pos_encoding": True}


def position_tokens(embeddings: nn.Module, size: tuple[int, int]) -> Tensor:
    """Compute what the embeddings add to a projected patch: `b + pos_j`, for each patch of an image of this size.

    Args:
        embeddings: a ViT's embeddings.
        size: height and width of the image in pixels; other than the backbone's own, positions are interpolated.

    Returns:
        (N, D) float64, row by row.
    """
    embeddings = copy.deepcopy(embeddings).double().eval()
    projection = patch_projection(embeddings)
    black = torch.zeros(1, projection.in_channels, *size, dtype=torch.float64, device=projection.weight.device)
    options = size_options(fixed_size(embeddings), size)
    with torch.no_grad():
        tokens = embeddings(black, **options)[0]
    number = (size[0] // projection.kernel_size[0]) * (size[1] // projection.kernel_size[1])
    return tokens[-number:]  # after the CLS token, and DeiT's second
