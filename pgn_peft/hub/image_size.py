"""Image processors whose images have another size than the model's, and a hook for such models."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from pgn_peft.hub.timm_processor import plain_processor
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.embeddings import own_image_size
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.utils.values import filled


def makes_another_size(layer: PGNLayer, image_processor: Any) -> bool:
    """Whether an image processor makes images of a size for which the backbone needs an option."""
    if layer.fixed_size is None:
        return False
    height, width = layer.fixed_size
    # Not square, to find processors that keep the aspect ratio.
    return made_size(image_processor, (height, 2 * width), layer.num_channels) != (height, width)


def made_of_square(layer: PGNLayer, image_processor: Any) -> tuple[int, int]:
    """Return height and width of what an image processor makes of a square image, in pixels."""
    return made_size(image_processor, own_image_size(layer), layer.num_channels)


def made_size(image_processor: Any, size: tuple[int, int], num_channels: int = 3) -> tuple[int, int]:
    """Return height and width in pixels of what an image processor makes of an image of this height and width."""
    sample = np.zeros((*size, num_channels), dtype=np.uint8)
    processor = plain_processor(image_processor)
    made = processor(images=sample, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return tuple(made.shape[-2:])


def interpolate_if_needed(model: nn.Module, image_processor: Any) -> None:
    """Have a model interpolate its position embeddings where its processor makes images of another size than its own.

    A pipeline has no option for that. Can be called again.

    Args:
        model: a Transformers model with a PGN adapter.
        image_processor: its image processor.

    Raises:
        ValueError: the model takes one size only, and the processor makes another.
    """
    if _interpolate in model._forward_pre_hooks.values():
        return
    layer = prompt_layer(model)
    if makes_another_size(layer, image_processor):
        if not layer.takes_size_option:
            height, width = filled(layer.fixed_size)
            raise ValueError(
                f"`image_processor` must make images of {height} x {width} pixels, the model's own size, "
                "but got another size. Set its `size` (and `crop_size`)."
            )
        model.register_forward_pre_hook(_interpolate, with_kwargs=True)


def _interpolate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"interpolate_pos_encoding": True} | kwargs
