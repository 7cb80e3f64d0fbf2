"""timm's image processing as an image processor that can be saved and set to another size."""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPImageProcessor

RESAMPLING = {"bilinear": 2, "bicubic": 3}


def plain_processor(image_processor: Any) -> Any:
    """Return an image processor of Transformers with timm's steps, in place of its wrapper, which cannot be saved.

    Where an odd number of pixels is cropped, the two differ by one. Other image processors are returned as they are.

    Raises:
        ValueError: timm crops or resizes in a way that no image processor has.
    """
    if type(image_processor).__name__ != "TimmWrapperImageProcessor":
        return image_processor
    steps = image_processor.data_config
    _, height, width = steps["input_size"]
    mode, interpolation = steps.get("crop_mode", "center"), steps["interpolation"]
    if mode not in ("center", "squash") or interpolation not in RESAMPLING or height != width:
        raise ValueError(
            f"`image_processor` must resize by {' or '.join(RESAMPLING)} and crop the centre of a square, but got "
            f"{interpolation!r}, {mode!r} and {height} x {width} pixels. Make an image processor of your own."
        )
    scaled = math.floor(height / steps["crop_pct"])
    return CLIPImageProcessor(
        size={"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        crop_size={"height": height, "width": width},
        resample=RESAMPLING[interpolation],
        image_mean=list(steps["mean"]),
        image_std=list(steps["std"]),
    )
