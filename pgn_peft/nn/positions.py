"""Positions in attention, extended by prompts, which have none. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def extend_rotations(rotations: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Extend cosines and sines (..., N, d) by tokens that are not rotated: (..., N + P, d) each."""
    cosines, sines = rotations
    return F.pad(cosines, (0, 0, 0, number), value=1.0), F.pad(sines, (0, 0, 0, number))


def extend_joined_rotations(rotations: Tensor, number: int) -> Tensor:
    """Extend sines beside cosines (..., N, 2 d) by tokens that are not rotated: (..., N + P, 2 d)."""
    sines, cosines = rotations.chunk(2, dim=-1)
    cosines, sines = extend_rotations((cosines, sines), number)
    return torch.cat([sines, cosines], dim=-1)


def extend_bias(bias: Tensor, number: int) -> Tensor:
    """Extend what is added to the products of queries and keys (..., N, N) by zeros for P tokens."""
    return F.pad(bias, (0, number, 0, number))
