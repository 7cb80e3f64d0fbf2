"""Resizing of images, for the generator and for layouts."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images by bilinear interpolation with antialiasing.

    Its weights are non-negative and sum to 1, so that pixels stay in their range, which bicubic interpolation does not
    ensure. Computed in float32, because torch supports no narrower type on the CPU.

    Args:
        pixel_values: (B, C, H, W), floating point.
        size: height and width, in pixels.

    Returns:
        (B, C, *size) in the same dtype; the input itself if it has that size.
    """
    if tuple(pixel_values.shape[-2:]) == tuple(size):
        return pixel_values
    return F.interpolate(pixel_values.float(), size=size, mode="bilinear", antialias=True).to(pixel_values.dtype)
