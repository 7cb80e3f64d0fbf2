"""Shared functions: resizing images, extending positions in attention by prompts, temporary eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize(pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images by bilinear interpolation with antialiasing.

    Unlike those of bicubic interpolation, its weights are non-negative and sum to 1, so pixels stay in their range.
    Computed in float32, because torch supports no narrower type on the CPU.

    Args:
        pixel_values: (B, C, H, W), floating point.
        size: height and width, in pixels.

    Returns:
        (B, C, *size) in the same dtype; the input itself if it has that size.
    """
    if tuple(pixel_values.shape[-2:]) == tuple(size):
        return pixel_values
    pixels = pixel_values.float()
    if is_exporting():
        # Some runtimes ignore the antialiasing of a resize node (openvino#35893) or have none (pytorch#121623). Two
        # matrix products give the same pixels everywhere, but take twice as long on a CPU for 224 to 64 pixels.
        rows, columns = (
            _filter(before, after, pixels.device) for before, after in zip(pixels.shape[-2:], size, strict=True)
        )
        return (rows @ pixels @ columns.T).to(pixel_values.dtype)
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True).to(pixel_values.dtype)


def is_exporting() -> bool:
    """Whether a graph is being exported to another runtime, by `torch.export` or by tracing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _filter(before: int, after: int, device: torch.device) -> Tensor:
    """Compute the weights (after, before) of torch's antialiased bilinear filter along one axis."""
    scale = int(before) / int(after)
    centres = (np.arange(int(after)) + 0.5) * scale
    distances = (np.arange(int(before)) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = (1 - np.abs(distances)).clip(min=0)
    return torch.tensor(weights / weights.sum(axis=1, keepdims=True), dtype=torch.float32, device=device)


def extend_rotations(rotations: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Extend rotary cosines and sines (..., N, d) by P = `number` tokens without rotation: (..., N + P, d) each."""
    cosines, sines = rotations
    return F.pad(cosines, (0, 0, 0, number), value=1.0), F.pad(sines, (0, 0, 0, number))


def extend_joined_rotations(rotations: Tensor, number: int) -> Tensor:
    """Extend concatenated sines and cosines (..., N, 2 d) in the same way: (..., N + P, 2 d)."""
    sines, cosines = rotations.chunk(2, dim=-1)
    cosines, sines = extend_rotations((cosines, sines), number)
    return torch.cat([sines, cosines], dim=-1)


def extend_bias(bias: Tensor, number: int) -> Tensor:
    """Extend an attention bias (..., N, N) by zeros for P = `number` tokens: (..., N + P, N + P)."""
    return F.pad(bias, (0, number, 0, number))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the mode of each submodule afterwards.

    Accelerate's mixed precision, which stays in a model's `forward` after training, is switched off meanwhile.
    """
    modes = [(part, part.training) for part in module.modules()]
    mixed = [(part, part.__dict__["forward"]) for part in module.modules() if "_original_forward" in part.__dict__]
    module.eval()
    try:
        for part, _ in mixed:
            part.forward = part._original_forward  # type: ignore[assignment]  # torch knows tensors and modules only
        yield
    finally:
        for part, forward in mixed:
            part.forward = forward
        for part, training in modes:
            part.training = training
