"""The steps of an image processor in plain torch: resize, crop, normalise; and adjustments of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Pillow's numbers for the resampling filters, which image processors store.
RESAMPLING = {2: "bilinear", 3: "bicubic"}


def normalize(pixels: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """Normalise pixels (..., C, H, W) in [0, 1] by the mean and standard deviation of each channel."""
    mean, std = _per_channel(image_mean, pixels), _per_channel(image_std, pixels)
    return (pixels - mean).div_(std)  # in place: nothing else holds the difference


def denormalize(pixel_values: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """Convert normalised pixels (..., C, H, W) back to [0, 1]: the inverse of `normalize`."""
    mean, std = _per_channel(image_mean, pixel_values), _per_channel(image_std, pixel_values)
    return (pixel_values * std).add_(mean)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    # Filled on the device: copying a list to a GPU would make the host wait for all queued work.
    return torch.stack([torch.full((1, 1), value, dtype=like.dtype, device=like.device) for value in values])


def check_image_processor(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is an image processor of Transformers that normalises."""
    if not all(hasattr(value, field) for field in ("image_mean", "rescale_factor", "save_pretrained")):
        raise TypeError(
            f"`{name}` is not an image processor, but a {type(value).__name__}. Load one: "
            "AutoImageProcessor.from_pretrained(model_id)."
        )


@dataclass(frozen=True)
class Preprocessing:
    """The steps of an image processor: resize, centre crop, and the statistics to normalise by.

    Args:
        image_mean: mean of each channel, of pixels in [0, 1].
        image_std: standard deviation of each channel.
        size: height and width to resize to, ignoring the aspect ratio; None: `shortest_edge` applies.
        shortest_edge: length to resize the shorter side to, keeping the aspect ratio; None: `size` applies. If both
            are None, images are not resized.
        resample: "bilinear" or "bicubic", antialiased.
        crop_size: height and width of the centre crop after resizing; None: no crop.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    resample: str = "bicubic"
    crop_size: tuple[int, int] | None = None

    @classmethod
    def from_processor(cls, processor: Any) -> Preprocessing:
        """Read the steps of a Transformers image processor.

        Raises:
            TypeError: `processor` is not an image processor.
            ValueError: `processor` has another filter or scale, does not normalise, or pads.
        """
        check_image_processor("processor", processor)
        size = dict(processor.size) if processor.do_resize else {}
        crops = getattr(processor, "do_center_crop", False)
        reproduced = {
            "do_normalize": processor.do_normalize,
            "do_rescale": processor.do_rescale,
            "do_pad": not getattr(processor, "do_pad", False),
            "rescale_factor": abs(processor.rescale_factor - 1 / 255) < 1e-9,
            "size": not processor.do_resize or set(size) in ({"height", "width"}, {"shortest_edge"}),
            "resample": not processor.do_resize or int(processor.resample) in RESAMPLING,
        }
        for name, is_reproduced in reproduced.items():
            if not is_reproduced:
                raise ValueError(
                    f"`{name}` is {getattr(processor, name)!r} in the image processor, which cannot be reproduced "
                    "without Transformers. Use one that resizes to height and width or to a shortest edge (bilinear "
                    "or bicubic), crops the centre, rescales by 1/255 and normalises."
                )
        return cls(
            image_mean=tuple(map(float, processor.image_mean)),
            image_std=tuple(map(float, processor.image_std)),
            size=(size["height"], size["width"]) if "height" in size else None,
            shortest_edge=size.get("shortest_edge"),
            resample=RESAMPLING[int(processor.resample)] if processor.do_resize else "bicubic",
            crop_size=(processor.crop_size["height"], processor.crop_size["width"]) if crops else None,
        )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of the model's input; None if they depend on the image."""
        return self.crop_size or self.size

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Padding at the left, right, top and bottom, in pixels, that the processor crops off a prompted image."""
        if self.crop_size is None or (self.size is None and self.shortest_edge is None):
            return (0, 0, 0, 0)
        outer = self.size or (self.shortest_edge or 0, self.shortest_edge or 0)
        if outer[0] < self.crop_size[0] or outer[1] < self.crop_size[1]:
            return (0, 0, 0, 0)  # the processor pads by itself
        top, left = ((whole - part) // 2 for whole, part in zip(outer, self.crop_size, strict=True))
        return (left, outer[1] - self.crop_size[1] - left, top, outer[0] - self.crop_size[0] - top)

    def apply(self, image: Tensor) -> Tensor:
        """Resize and crop an image (C, H, W) of 8-bit pixels, as the processor does."""
        height, width = image.shape[-2:]
        size = self.size or (height, width)
        if self.shortest_edge is not None:
            shorter = min(height, width)
            # In integers: int(side * (shortest_edge / shorter)) can lose a pixel.
            size = (self.shortest_edge * height // shorter, self.shortest_edge * width // shorter)
        if size != (height, width):
            # On 8-bit pixels, as in torchvision: the model was trained with this rounding.
            image = F.interpolate(image[None], size=size, mode=self.resample, antialias=True)[0]
        if self.crop_size is not None:
            (height, width), (crop_height, crop_width) = image.shape[-2:], self.crop_size
            top, left = max((height - crop_height) // 2, 0), max((width - crop_width) // 2, 0)
            image = image[..., top : top + crop_height, left : left + crop_width]
        return image


@dataclass(frozen=True)
class Adjustment:
    """Changes of a whole image before prompts are added to it.

    Args:
        mirrored: from left to right.
        stretched: each channel's smallest value becomes 0 and its largest 1.
        contrast: factor of each pixel's distance from middle grey.
    """

    mirrored: bool = False
    stretched: bool = False
    contrast: float = 1.0

    def apply(self, pixels: Tensor) -> Tensor:
        """Change pixels (B, C, H, W) in [0, 1]; the result can lie outside."""
        if self.mirrored:
            pixels = pixels.flip(-1)
        if self.stretched:
            lowest, highest = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
            pixels = (pixels - lowest) / (highest - lowest).clamp(min=1 / 255)
        return pixels if self.contrast == 1 else (pixels - 0.5) * self.contrast + 0.5
