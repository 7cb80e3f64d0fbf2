"""JPEG inside a network: pixels as a server decodes them, with gradients that pass unchanged."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@torch.library.custom_op("pgn_peft::through_jpeg", mutates_args=())
def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Encode images as JPEG and decode them, with Pillow on the CPU; gradients pass unchanged (straight through).

    Args:
        pixels: (B, C, H, W) in [0, 1], of one or three channels, any device.
        quality: as Pillow counts it, 1 to 100; 75 is its default. Colours have half the resolution (4:2:0).

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
