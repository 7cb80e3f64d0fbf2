"""Initialisation of an adapter from training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgn_peft.nn.library import PatchLibrary
from pgn_peft.nn.preprocessing import denormalize
from pgn_peft.tuner.adapters import find_layer
from pgn_peft.utils.values import filled


@torch.no_grad()
def start_library_from_images(
    model: nn.Module, pixel_values: Tensor, adapter_name: str = "default", seed: int = 0
) -> None:
    """Start a library of patches from patches of training images, before the adapter is trained.

    Args:
        model: a model with the adapter.
        pixel_values: (B, C, H, W), normalised as for the backbone: up to a few hundred training images, at least as
            large as a patch.
        adapter_name: an adapter in pixel space, of the "canvas" or "append" layout. (A "dense" one starts at zero.)
        seed: for the random choice of patches.

    Raises:
        ValueError: no adapter has this name, its library holds no patches, or `pixel_values` has the wrong axes, size
            or range.
    """
    layer = find_layer(model, adapter_name)
    library, config = layer.library(adapter_name), layer.configs[adapter_name]
    if not isinstance(library, PatchLibrary):
        raise ValueError(
            f"`adapter_name` must be an adapter with a library of patches, but got {adapter_name!r} with "
            f"prompt_space={config.prompt_space!r}, prompt_layout={config.prompt_layout!r}, whose library starts by "
            "itself. Leave this call out."
        )
    channels, side = library.patch_logits.shape[1:3]
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or min(pixel_values.shape[2:]) < side:
        raise ValueError(
            f"`pixel_values` must have the axes (B, {channels}, H, W) and measure {side} pixels at least, but got "
            f"{tuple(pixel_values.shape)}. Stack images of one size."
        )
    pixels = denormalize(pixel_values.float(), filled(config.image_mean), filled(config.image_std))
    rounding = 1e-3
    if not len(pixels) or not bool(((pixels >= -rounding) & (pixels <= 1 + rounding)).all()):
        found = (
            f"pixels from {pixels.min().item():g} to {pixels.max().item():g} without that" if len(pixels) else "none"
        )
        raise ValueError(
            f"`pixel_values` must be normalised with the adapter's `image_mean` and `image_std`, but got {found}. Use "
            "the model's image processor."
        )
    library.start_from_images(pixels.clamp(0, 1), torch.Generator().manual_seed(seed))
