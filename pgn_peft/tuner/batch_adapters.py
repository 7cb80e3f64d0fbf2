"""The adapter of each image in a mixed batch, and processing of a batch adapter by adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# PEFT's name for the model without an adapter.
BASE = "__base__"

# For each thread that runs a mixed batch, the adapter's name for each image. Empty at all other times, which is what a
# compiled model is specialised on.
_NAMES: dict[int, tuple[str, ...]] = {}


def adapters_of_batch() -> tuple[str, ...] | None:
    """Return for each image the name of its adapter if this thread runs a mixed batch, else None."""
    return _NAMES.get(threading.get_ident()) if _NAMES else None


@contextmanager
def running_batch(names: tuple[str, ...]) -> Iterator[None]:
    """Let `adapters_of_batch` return these names in this thread, within the context."""
    thread = threading.get_ident()
    _NAMES[thread] = names
    try:
        yield
    finally:
        del _NAMES[thread]


def map_by_adapter(
    names: Sequence[str], batch: Tensor, function: Callable[[str, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Apply a function adapter by adapter.

    Args:
        names: the adapter of each image.
        batch: (B, ...).
        function: called once for each adapter with its name and its images (b, ...), returns tensors (b, ...).

    Returns:
        The function's results (B, ...), in the order of `batch`.
    """
    parts: list[tuple[Tensor, ...]] = []
    places: list[int] = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        parts.append(function(name, batch[rows]))
        places += rows
    order = torch.tensor(places, device=batch.device).argsort()
    return tuple(torch.cat(results)[order] for results in zip(*parts, strict=True))
