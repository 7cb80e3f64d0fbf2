"""Checks of the adapted model's input, and of adapters that are active together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pgn_peft.nn.images import PILLOW_MODES
from pgn_peft.tuner.config import PGNConfig


def check_pixel_values(
    pixel_values: Any, num_channels: int, image_size: tuple[int, int] | None, takes_option: bool = True
) -> None:
    """Check shape and dtype of a backbone's input.

    Args:
        pixel_values: must be (B, C, H, W), floating point.
        num_channels: channels C that the backbone takes.
        image_size: height and width that it takes, in pixels; None: any.
        takes_option: it takes others with `interpolate_pos_encoding=True`.

    Raises:
        TypeError: `pixel_values` is not a floating-point tensor.
        ValueError: `pixel_values` has the wrong number of axes, channels or pixels.
    """
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"`pixel_values` must be a tensor (B, C, H, W), but got {type(pixel_values).__name__}. Run the image "
            "processor first: processor(images=..., return_tensors='pt')."
        )
    shape = tuple(pixel_values.shape)
    if len(shape) != 4:
        raise ValueError(
            f"`pixel_values` must have the four axes (B, C, H, W), but got shape {shape}. "
            "Add the batch axis to a single image: pixel_values[None]."
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"`pixel_values` must be normalised floating-point images, but got {pixel_values.dtype}, which looks "
            "like pixels in 0..255. Run the image processor first."
        )
    if shape[1] != num_channels:
        mode = PILLOW_MODES.get(num_channels, "...")
        raise ValueError(
            f"`pixel_values` must have {num_channels} channels, as the backbone does, but got {shape[1]} in "
            f"shape {shape}. Convert the images, e.g. image.convert({mode!r})."
        )
    if image_size is not None and shape[2:] != image_size:
        raise ValueError(
            f"`pixel_values` must measure {image_size[0]} x {image_size[1]} pixels, as the backbone expects, but got "
            f"{shape[2]} x {shape[3]}. Resize the images{', or pass interpolate_pos_encoding=True' * takes_option}."
        )


def check_together(adapter_names: Sequence[str], configs: Mapping[str, PGNConfig]) -> None:
    """Refuse adapters that cannot be active at the same time.

    Raises:
        ValueError: more than one adapter is in pixel space, or one of several has prompts in several layers.
    """
    in_pixels = [name for name in adapter_names if configs[name].prompt_space == "pixel"]
    if len(in_pixels) > 1:
        raise ValueError(
            f"`adapter_name` must name one adapter in pixel space at most, but got {', '.join(in_pixels)}: both would "
            "lay their patches into the same image. Activate one of them."
        )
    deep = next((name for name in adapter_names if configs[name].prompt_depth != 1), None)
    if deep is not None and len(adapter_names) > 1:
        raise ValueError(
            f"`adapter_name` must name no other adapter beside {deep!r}, which has prompts in several layers, but got "
            f"{', '.join(adapter_names)}: their prompts would take each other's place. Activate one of them."
        )
