"""Images of every kind that users have, as 8-bit pixels, and back. Torch, numpy and Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from pgn_peft.nn.preprocessing import Preprocessing

# Pillow's name for images of so many channels.
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that Pillow converts to few others, and one of those.
INTERMEDIATE_MODES = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}
# Formats whose pixels Pillow scales to 16 bits where it opens them as 32-bit integers.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# The number of a TIFF file's tag with the bits of a pixel.
TIFF_BITS = 258
_GREY = "Grey images and images with transparency are converted if they come as Pillow images."


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
