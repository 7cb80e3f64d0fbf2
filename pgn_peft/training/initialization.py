"""Initialisation of an adapter from training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgn_peft.nn.library import PatchLibrary
from pgn_peft.tuner.layer import PGNLayer


@torch.no_grad()
def start_library_from_images(model: nn.Module, images: Tensor, adapter_name: str = "default", seed: int = 0) -> None:
    """Start the library of an adapter in pixel space from patches of training images, before it is trained.

    Args:
        model: a model with the adapter.
        images: (B, C, H, W) in [0, 1], a few hundred, at least as large as a patch.
        adapter_name: the adapter.
        seed: for the random choice of patches.

    Raises:
        ValueError: no adapter in pixel space has this name, or `images` has the wrong axes, size or range.
    """
    libraries = [
        library
        for layer in model.modules()
        if isinstance(layer, PGNLayer) and adapter_name in layer.layouts
        if isinstance(library := layer.library(adapter_name), PatchLibrary)
    ]
    if not libraries:
        raise ValueError(
            f"`adapter_name` must be an adapter in pixel space, but got {adapter_name!r}. Make it with "
            "PGNConfig(prompt_space='pixel', ...)."
        )
    channels, side = libraries[0].patch_logits.shape[1:3]
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise ValueError(
            f"`images` must have the axes (B, {channels}, H, W) and measure {side} pixels at least, but got "
            f"{tuple(images.shape)}. Stack images of one size."
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"`images` must lie in [0, 1], but got {images.min().item():g} to {images.max().item():g}. Give them "
            "before they are normalised, or undo it: `pgn_peft.nn.preprocessing.denormalize`."
        )
    libraries[0].start_from_images(images, torch.Generator().manual_seed(seed))
