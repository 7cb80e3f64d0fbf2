"""Conversion of users' images to 8-bit pixels and back, and JPEG compression as a step of training."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from pgn_peft.nn.preprocessing import Preprocessing

# Pillow's name for images of so many channels.
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that Pillow converts to others only by way of an intermediate mode -> that mode.
INTERMEDIATE_MODES = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}
TIFF_BITS = 258  # the TIFF tag BitsPerSample


def convert_image(image: Image.Image, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Convert a Pillow image of any mode to an upright image of 8 bits per channel.

    The EXIF orientation is applied. Transparency is dropped, as in Transformers' pipelines. 16-bit integers are scaled
    from 0..65535 and floats from [0, 1]; Pillow would clip both at 255.

    Args:
        image: the image.
        mode: Pillow's name for the channels: "RGB", "L" or "RGBA".
        name: the image's name in error messages; None: its file name.

    Returns:
        An image of that mode, without an EXIF orientation.

    Raises:
        ValueError: the range of the pixels is unknown: 32-bit integers, or floats outside [0, 1].
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
    """Return the upper end of the range of pixels; None for 8-bit pixels."""
    if image.mode.startswith("I;16"):
        # TIFF files can have 12 bits.
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS, (16,))[0]
        return 2**bits - 1
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales these to 16 bits
        return 65535
    pixels = np.asarray(image)
    if image.mode == "F" and bool(((pixels >= 0) & (pixels <= 1)).all()):
        return 1
    raise ValueError(
        f"Unknown range of pixels{f' in {name!r}' if name else ''}: mode {image.mode!r} with values from "
        f"{pixels.min():g} to {pixels.max():g}. Scale floats to [0, 1], or save the image with 8 bits."
    )


def to_pixels(image: Any, num_channels: int) -> Tensor:
    """Convert one image to 8-bit pixels.

    Args:
        image: a Pillow image of any mode; a numpy array (H, W, C) or a tensor (C, H, W), of unsigned integers of 8 or
            16 bits, or of floats in [0, 1].
        num_channels: channels C that the model takes.

    Returns:
        (C, H, W) uint8.

    Raises:
        TypeError: `image` has another type or dtype.
        ValueError: `image` has another number of channels, or values out of range.
    """
    if isinstance(image, Image.Image):
        image = np.array(convert_image(image, PILLOW_MODES[num_channels]))
        image = image if image.ndim == 3 else image[:, :, None]
    if isinstance(image, np.ndarray):
        native = image.dtype.newbyteorder("=")  # torch has no other byte order
        image = torch.from_numpy(np.ascontiguousarray(image, dtype=native)).movedim(-1, 0)
    is_tensor = isinstance(image, Tensor)
    if not is_tensor or not (image.is_floating_point() or image.dtype in (torch.uint8, torch.uint16)):
        raise TypeError(
            f"An image of type {image.dtype if is_tensor else type(image).__name__} cannot be read. Give Pillow "
            "images, or arrays or tensors of floats in [0, 1] or of unsigned integers of 8 or 16 bits."
        )
    if image.ndim != 3 or image.shape[0] != num_channels:
        raise ValueError(
            f"The model takes images of {num_channels} channels, but one has the shape {tuple(image.shape)} (channels "
            "first). Give arrays as (H, W, C), tensors as (C, H, W), and grey or transparent images as Pillow images."
        )
    if image.dtype == torch.uint8:
        return image.cpu()
    if image.dtype == torch.uint16:
        return to_8_bit(image.float() / 65535).cpu()
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(
            f"Float images must lie in [0, 1], but one goes from {image.min().item():g} to "
            f"{image.max().item():g}. Give images that have not been normalised."
        )
    return to_8_bit(image).cpu()


def read_images(
    images: Any, preprocessing: Preprocessing, num_channels: int, size: tuple[int, int]
) -> tuple[Tensor, type, bool]:
    """Convert a user's images to a batch, and apply the image processor's steps.

    Args:
        images: one image or several, as for `to_pixels`; arrays and tensors may be batches.
        preprocessing: the processor's steps.
        num_channels: channels C that the model takes.
        size: required height and width after these steps.

    Returns:
        (B, C, H, W) uint8 pixels; the type of the images; and whether a single image was given.

    Raises:
        TypeError: an image has another type or dtype.
        ValueError: there are no images, or one has values out of range or another size after the steps.
    """
    batched = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
    single = not batched and (
        isinstance(images, (Image.Image, np.ndarray, Tensor)) or not isinstance(images, Iterable)
    )
    several = [images] if single else list(images)
    if not several:
        raise ValueError("No images were given.")
    kind = Image.Image if isinstance(several[0], Image.Image) else type(several[0])
    processed = [preprocessing.apply(to_pixels(image, num_channels)) for image in several]
    for index, image in enumerate(processed):
        if tuple(image.shape[-2:]) != size:
            raise ValueError(
                f"Image {index} must measure {size[0]} x {size[1]} pixels after the processor's steps, but measures "
                f"{image.shape[1]} x {image.shape[2]}. Resize it first."
            )
    return torch.stack(processed), kind, single


def to_8_bit(pixels: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to uint8 by rounding; values outside are clipped."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_images(pixels: Tensor, kind: type) -> Any:
    """Convert 8-bit pixels (B, C, H, W) to a tensor, an array (B, H, W, C), or a list of Pillow images.

    Args:
        pixels: (B, C, H, W) uint8.
        kind: `Tensor`, `numpy.ndarray` or `PIL.Image.Image`.
    """
    if issubclass(kind, Tensor):
        return pixels.cpu()
    arrays = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    if issubclass(kind, np.ndarray):
        return arrays
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


@torch.library.custom_op("pgn_peft::through_jpeg", mutates_args=())
def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Encode images as JPEG and decode them, with Pillow on the CPU; gradients pass unchanged (straight-through).

    Args:
        pixels: (B, C, H, W) in [0, 1], of one or three channels, on any device.
        quality: Pillow's JPEG quality, 1 to 100; its default is 75. Chroma is subsampled (4:2:0).

    Returns:
        (B, C, H, W), of the same dtype.
    """
    images = (pixels.detach() * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
    decoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous().to(pixels) / 255


@through_jpeg.register_fake
def _(pixels: Tensor, quality: int) -> Tensor:
    return torch.empty_like(pixels, memory_format=torch.contiguous_format)


through_jpeg.register_autograd(lambda context, gradient: (gradient, None))
