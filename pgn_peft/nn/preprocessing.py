"""The steps of an image processor without Transformers: resize, crop, normalise. Torch, numpy and Pillow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

# Pillow's numbers for the resampling filters, which image processors store.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
# Pillow's name for images of so many channels.
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that Pillow converts to few others, and one of those.
INTERMEDIATE_MODES = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}
# Formats whose pixels Pillow scales to 16 bits where it opens them as 32-bit integers.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# The number of a TIFF file's tag with the bits of a pixel.
TIFF_BITS = 258


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


def convert_image(image: Image.Image, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Turn a Pillow image of any mode into an upright one of 8-bit pixels.

    The EXIF orientation is applied, and transparency is dropped, as Transformers' pipelines do. Wider pixels are
    scaled, where Pillow would clip them at 255: 16-bit integers from 0..65535, and floats from [0, 1].

    Args:
        image: the image.
        mode: Pillow's name for the channels: "RGB", "L" or "RGBA".
        name: what an error calls the image; None: its file's name.

    Returns:
        An image of that mode, without an EXIF orientation.

    Raises:
        ValueError: the range of the pixels is not known: 32-bit integers, or floats outside of [0, 1].
    """
    largest = _largest_value(image, getattr(image, "filename", "") if name is None else name)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if largest is not None:
        pixels = np.asarray(image, dtype=np.float32) * (255 / largest)
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.mode in INTERMEDIATE_MODES and image.mode != mode:
        image = image.convert(INTERMEDIATE_MODES[image.mode])
    return image.convert(mode)


def _largest_value(image: Image.Image, name: str) -> int | None:
    """Return the largest value that a pixel of more than 8 bits can have; None for 8 bits."""
    if image.mode.startswith("I;16"):
        # A TIFF file can have 12 bits.
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS, (16,))[0]
        return 2**bits - 1
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS:
        return 65535
    pixels = np.asarray(image)
    if image.mode == "F" and bool(((pixels >= 0) & (pixels <= 1)).all()):
        return 1
    rule = "floats in [0, 1]" if image.mode == "F" else "integers of 8 or 16 bits"
    raise ValueError(
        f"`images` must have {rule} as pixels, but got mode {image.mode!r} with values from {pixels.min():g} to "
        f"{pixels.max():g}{f' in {name!r}' if name else ''}. Scale them to 0..255, and save them as 8-bit images."
    )


def to_pixels(image: Any, num_channels: int) -> Tensor:
    """Turn one image into 8-bit pixels.

    Args:
        image: a Pillow image of any mode; a numpy array (H, W, C) or a tensor (C, H, W), of unsigned integers of 8 or
            16 bits, or of floats in [0, 1].
        num_channels: channels C that the model takes.

    Returns:
        (C, H, W) uint8.

    Raises:
        TypeError: `image` is of another kind.
        ValueError: `image` has another number of channels, or values out of range.
    """
    if isinstance(image, Image.Image):
        image = np.array(convert_image(image, PILLOW_MODES[num_channels]))
        return torch.from_numpy(image if image.ndim == 3 else image[:, :, None]).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        if image.ndim != 3:
            raise ValueError(f"`images` must have the axes (H, W, C) as arrays, but got {image.shape}. {_GREY}")
        native = image.dtype.newbyteorder("=")  # torch has no other byte order
        image = torch.from_numpy(np.ascontiguousarray(image, dtype=native)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"`images` must be Pillow images, numpy arrays or tensors, but got {type(image).__name__}. Open files "
            "with PIL.Image.open."
        )
    if image.ndim != 3 or image.shape[0] != num_channels:
        raise ValueError(
            f"`images` must have {num_channels} channels, (H, W, C) as arrays and (C, H, W) as tensors, but got a "
            f"tensor of {tuple(image.shape)}. {_GREY}"
        )
    if image.numel() == 0:
        raise ValueError(f"`images` must have pixels, but got none in {tuple(image.shape)}. Drop empty images.")
    if image.dtype == torch.uint8:
        return image.cpu()
    if image.dtype == torch.uint16:
        return to_8_bit(image.float() / 65535).cpu()
    if not image.is_floating_point():
        raise TypeError(
            f"`images` must be unsigned 8-bit integers or floats in [0, 1], or unsigned 16-bit integers, but got "
            f"{image.dtype}. Convert them."
        )
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(
            f"`images` must lie in [0, 1] as floats, but got {image.min().item():g} to {image.max().item():g}. Give "
            "images as they are, before normalisation."
        )
    return to_8_bit(image).cpu()


_GREY = "Grey images and images with transparency are converted if they come as Pillow images."


def read_images(
    images: Any, preprocessing: Preprocessing, num_channels: int, size: tuple[int, int]
) -> tuple[Tensor, type, bool]:
    """Turn what a user gives into a batch that has gone through the processor's steps.

    Args:
        images: one image or several: Pillow images, arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or
            (B, C, H, W), or a list of them.
        preprocessing: the processor's steps.
        num_channels: channels C that the model takes.
        size: height and width that must come out.

    Returns:
        (B, C, H, W) uint8 pixels; the kind of images it was; and whether it was a single one.

    Raises:
        TypeError: an image is of no such kind.
        ValueError: `images` is empty, has values out of range, or another size comes out.
    """
    batched = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
    single = not batched and isinstance(images, (Image.Image, np.ndarray, Tensor))
    several = list(images) if isinstance(images, Iterable) and not single else [images]
    if not several:
        raise ValueError("`images` must be one image at least, but got none. Leave the call out.")
    kind = Image.Image if isinstance(several[0], Image.Image) else type(several[0])
    processed = [preprocessing.apply(to_pixels(image, num_channels)) for image in several]
    for index, image in enumerate(processed):
        if tuple(image.shape[-2:]) != size:
            raise ValueError(
                f"`images` must measure {size[0]} x {size[1]} pixels after the processor's steps, but got "
                f"{image.shape[1]} x {image.shape[2]} for image {index}. Resize it first."
            )
    return torch.stack(processed), kind, single


def to_8_bit(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to uint8, clipping what lies outside."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_images(pixels: Tensor, kind: type) -> Any:
    """Turn 8-bit pixels into the kind of images that a user works with.

    Args:
        pixels: (B, C, H, W) uint8.
        kind: `Tensor`, `numpy.ndarray` or `PIL.Image.Image`.

    Returns:
        The tensor; an array (B, H, W, C); or a list of B Pillow images.
    """
    if issubclass(kind, Tensor):
        return pixels.cpu()
    arrays = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    if issubclass(kind, np.ndarray):
        return arrays
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]
