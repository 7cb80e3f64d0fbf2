"""The one way in which images are resized here: for the generator, and into the rectangle that a layout leaves."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images, each pixel an average of those it stands for.

    Bilinear with antialiasing: the weights are non-negative and sum to 1, so that pixels stay in their range, in [0,
    1] or normalised, which a bicubic resize does not promise. Computed in float32: torch has it for no narrower type
    on the CPU.

    Args:
        pixel_values: (B, C, H, W), floating point.
        size: height and width, in pixels.

    Returns:
        (B, C, *size) in the same dtype; the input itself where it has that size.
    """
    if tuple(pixel_values.shape[-2:]) == tuple(size):
        return pixel_values
    return F.interpolate(pixel_values.float(), size=size, mode="bilinear", antialias=True).to(pixel_values.dtype)
