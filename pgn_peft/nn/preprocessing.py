"""The steps of an image processor without Transformers: resize, crop, normalise. Plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Pillow's numbers for the resampling filters, which image processors store.
RESAMPLING = {2: "bilinear", 3: "bicubic"}


def normalize(pixels: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """Turn pixels (..., C, H, W) in [0, 1] into normalised ones."""
    mean, std = _per_channel(image_mean, pixels), _per_channel(image_std, pixels)
    return (pixels - mean).div_(std)  # in place: nothing else holds the difference


def denormalize(pixel_values: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """Turn normalised pixels (..., C, H, W) into those in [0, 1]; the inverse of `normalize`."""
    mean, std = _per_channel(image_mean, pixel_values), _per_channel(image_std, pixel_values)
    return (pixel_values * std).add_(mean)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    # Filled in place: a list that is copied to a GPU would have the host wait for all that is queued there.
    return torch.stack([torch.full((1, 1), value, dtype=like.dtype, device=like.device) for value in values])


def check_image_processor(name: str, value: Any) -> None:
    """Raise unless `value` is an image processor of Transformers that normalises."""
    if not (hasattr(value, "image_mean") and hasattr(value, "rescale_factor") and hasattr(value, "save_pretrained")):
        raise TypeError(
            f"`{name}` must be an image processor, but got {type(value).__name__}. Load it: "
            "AutoImageProcessor.from_pretrained(model_id)."
        )


@dataclass(frozen=True)
class Preprocessing:
    """The steps of an image processor, from any image to the pixels that the model's input is normalised from.

    Args:
        image_mean: mean of each channel, of pixels in [0, 1].
        image_std: standard deviation of each channel.
        size: height and width that images are resized to, whatever their aspect; None where it is the shorter side.
        shortest_edge: length that the shorter side is resized to; None where `size` is given, or nothing is resized.
        resample: "bilinear" or "bicubic", antialiased.
        crop_size: height and width that are cut out of the middle afterwards; None: nothing is cut.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    resample: str = "bicubic"
    crop_size: tuple[int, int] | None = None

    @classmethod
    def from_processor(cls, processor: Any) -> Preprocessing:
        """Read the steps off a Transformers image processor.

        Raises:
            TypeError: `processor` is not an image processor.
            ValueError: `processor` has another filter or scale, does not normalise, or pads.
        """
        check_image_processor("processor", processor)
        for name, wanted in (("do_normalize", True), ("do_rescale", True), ("do_pad", False)):
            found = getattr(processor, name, None)
            if found is not None and bool(found) != wanted:
                raise ValueError(
                    f"`{name}` must be {wanted} in the image processor, but got {found!r}. Use a processor that "
                    "resizes, crops, rescales and normalises, and nothing else."
                )
        if abs(processor.rescale_factor - 1 / 255) > 1e-9:
            raise ValueError(
                f"`rescale_factor` must be 1/255 in the image processor, but got {processor.rescale_factor!r}. Pixels "
                "are taken to lie in [0, 1] before they are normalised."
            )
        size, shortest_edge, crop_size, resample = None, None, None, "bicubic"
        if processor.do_resize:
            described = dict(processor.size)
            if set(described) - {"height", "width", "shortest_edge"} or not described:
                raise ValueError(
                    f"`size` must have height and width, or shortest_edge, in the image processor, but got "
                    f"{described!r}. Use a processor that resizes to a fixed size."
                )
            shortest_edge = described.get("shortest_edge")
            size = None if shortest_edge is not None else (described["height"], described["width"])
            if int(processor.resample) not in RESAMPLING:
                raise ValueError(
                    f"`resample` must be bilinear (2) or bicubic (3) in the image processor, but got "
                    f"{processor.resample!r}. Train with one of these."
                )
            resample = RESAMPLING[int(processor.resample)]
        if getattr(processor, "do_center_crop", False):
            crop_size = (processor.crop_size["height"], processor.crop_size["width"])
        mean, std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
        return cls(mean, std, size, shortest_edge, resample, crop_size)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of what the model gets; None where they depend on the image."""
        return self.crop_size or self.size

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels to add at the left, right, top and bottom of a finished image, for the processor to cut off again."""
        if self.crop_size is None or (self.size is None and self.shortest_edge is None):
            return (0, 0, 0, 0)
        outer = self.size or (self.shortest_edge or 0, self.shortest_edge or 0)
        if outer[0] < self.crop_size[0] or outer[1] < self.crop_size[1]:
            return (0, 0, 0, 0)  # it pads by itself
        top, left = ((whole - part) // 2 for whole, part in zip(outer, self.crop_size, strict=True))
        return (left, outer[1] - self.crop_size[1] - left, top, outer[0] - self.crop_size[0] - top)

    def apply(self, image: Tensor) -> Tensor:
        """Resize and crop an image (C, H, W) of 8-bit pixels, as the processor does."""
        height, width = image.shape[-2:]
        size = self.size
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(height, width)
            sides = (
                self.shortest_edge if side == min(height, width) else int(side * scale) for side in (height, width)
            )
            size = cast("tuple[int, int]", tuple(sides))
        if size is not None and size != (height, width):
            # On 8-bit pixels, as torchvision does it: rounding is part of what the model was trained with.
            image = F.interpolate(image[None], size=size, mode=self.resample, antialias=True)[0]
        if self.crop_size is not None:
            (height, width), (crop_height, crop_width) = image.shape[-2:], self.crop_size
            top, left = max((height - crop_height) // 2, 0), max((width - crop_width) // 2, 0)
            image = image[..., top : top + crop_height, left : left + crop_width]
        return image
