"""Image processors: conversion of timm's, the size of their output, and models that interpolate to this size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn
from transformers import CLIPImageProcessor

from pgn_peft.nn import preprocessing
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.layer import PGNLayer

RESAMPLING = {name: number for number, name in preprocessing.RESAMPLING.items()}


def plain_processor(image_processor: Any) -> Any:
    """Convert Transformers' wrapper of timm's preprocessing, which cannot be saved, to an ordinary image processor.

    If an odd number of pixels is cropped, the crops differ by one. Other image processors are returned unchanged.

    Raises:
        ValueError: timm crops or resizes in a way that no image processor of Transformers supports.
    """
    if type(image_processor).__name__ != "TimmWrapperImageProcessor":
        return image_processor
    steps = image_processor.data_config
    _, height, width = steps["input_size"]
    mode, interpolation = steps.get("crop_mode", "center"), steps["interpolation"]
    if mode not in ("center", "squash") or interpolation not in RESAMPLING or height != width:
        raise ValueError(
            f"No image processor of Transformers resizes by {interpolation!r} and crops by {mode!r} to {height} x "
            f"{width} pixels, as timm does here. Make one with other steps: CLIPImageProcessor(...)."
        )
    scaled = math.floor(height / steps["crop_pct"])
    return CLIPImageProcessor(
        size={"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        crop_size={"height": height, "width": width},
        resample=RESAMPLING[interpolation],
        image_mean=list(steps["mean"]),
        image_std=list(steps["std"]),
    )


def made_size(image_processor: Any, size: tuple[int, int], num_channels: int = 3) -> tuple[int, int]:
    """Return height and width, in pixels, of an image processor's output for an image of this height and width."""
    sample = np.zeros((*size, num_channels), dtype=np.uint8)
    processor = plain_processor(image_processor)
    made = processor(images=sample, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return tuple(made.shape[-2:])


def makes_another_size(layer: PGNLayer, image_processor: Any) -> bool:
    """Whether the backbone needs an option for images of the size that an image processor makes."""
    if layer.fixed_size is None:
        return False
    height, width = layer.fixed_size
    # Not square, to detect processors that keep the aspect ratio.
    return made_size(image_processor, (height, 2 * width), layer.num_channels) != (height, width)


def interpolate_if_needed(model: nn.Module, image_processor: Any) -> None:
    """Let a model interpolate its position embeddings if its image processor makes images of another size.

    A hook does it, since a pipeline has no option for it. Calling this again has no effect.

    Raises:
        ValueError: the model takes one size only, and the processor makes another.
    """
    layer = prompt_layer(model)
    if _interpolate in model._forward_pre_hooks.values() or not makes_another_size(layer, image_processor):
        return
    if not layer.takes_size_option:
        raise ValueError(
            f"The model takes only images of {layer.fixed_size} pixels, but the image processor makes others. Set its "
            "`size` (and `crop_size`)."
        )
    model.register_forward_pre_hook(_interpolate, with_kwargs=True)


def _interpolate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"interpolate_pos_encoding": True} | kwargs
