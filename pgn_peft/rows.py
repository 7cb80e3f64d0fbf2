"""Which adapter each image of a batch belongs to, and how a batch is taken apart by it. Plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

# PEFT's name for the model without an adapter.
BASE = "__base__"

# One name an image while a mixed batch runs, else None. A context variable rather than an attribute of the layers, so
# that threads do not see each other's batches.
ROWS: ContextVar[tuple[str, ...] | None] = ContextVar("pgn_peft_rows", default=None)


def restore_order(places: Sequence[int], device: torch.device) -> Tensor:
    """Return the index (B,) that puts rows back which were taken from `places`, a permutation of 0..B-1."""
    return torch.tensor(places, device=device).argsort()


def map_rows(names: Sequence[str], batch: Tensor, function: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Apply a function adapter by adapter.

    Args:
        names: for each row its adapter.
        batch: (B, ...).
        function: called once for each adapter with its name and its rows (b, ...), returns (b, ...).

    Returns:
        What it returned, (B, ...), in the order of `batch`.
    """
    parts: list[Tensor] = []
    places: list[int] = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        parts.append(function(name, batch[rows]))
        places += rows
    return torch.cat(parts)[restore_order(places, batch.device)]
