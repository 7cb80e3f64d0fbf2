"""What a backbone's embeddings are: their patch projection, the images that they take, and their positions."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn


def patch_projection(embeddings: nn.Module) -> nn.Conv2d:
    """Return the convolution that makes a token (D,) of each patch (C, p, p), whatever the architecture calls it."""
    found: Any = embeddings
    for name in ("patch_embeddings", "patch_embedding", "patch_embed"):
        if hasattr(found, name):
            found = getattr(found, name)
            break
    for name in ("projection", "proj"):
        if hasattr(found, name):
            found = getattr(found, name)
            break
    return found


def own_image_size(embeddings: nn.Module) -> tuple[int, int]:
    """Return height and width in pixels of the images that the position embeddings were trained for."""
    parts: Any = embeddings
    places = (getattr(parts, "patch_embeddings", None), parts, getattr(parts, "config", None))
    sizes = (getattr(place, name, None) for place in places for name in ("image_size", "img_size"))
    size = next(size for size in sizes if size is not None)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def has_class_token(embeddings: nn.Module) -> bool:
    """Whether token 0 is CLS rather than the first patch."""
    return hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")


def returns_grid(embeddings: nn.Module) -> bool:
    """Whether embeddings return the grid of patches beside the tokens."""
    return type(embeddings).__name__ == "Data2VecVisionEmbeddings"


def takes_size_option(embeddings: nn.Module) -> bool:
    """Whether a backbone interpolates its positions for an image of another size only if it is told to."""
    return "interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters


def takes_any_size(embeddings: nn.Module) -> bool:
    """Whether a backbone takes images of every size without being told."""
    parts: Any = embeddings
    if hasattr(parts, "strict_img_size"):  # timm's
        return not parts.strict_img_size
    if hasattr(parts, "interpolate_pos_encoding"):
        return not takes_size_option(embeddings)
    has_table = hasattr(parts, "position_embedding") or hasattr(parts, "position_embeddings")
    return not takes_size_option(embeddings) and not has_table


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
