"""Which adapter each image of a batch belongs to, and how a batch is taken apart by it. Plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# PEFT's name for the model without an adapter.
BASE = "__base__"

# One name an image while a mixed batch runs, else None. A context variable rather than an attribute of the layers, so
# that threads do not see each other's batches.
ROWS: ContextVar[tuple[str, ...] | None] = ContextVar("pgn_peft_rows", default=None)

_LOCK = threading.Lock()
_running = 0
# Whether one runs in any thread. Plain, because torch 2.11 cannot compile a look at a context variable.
_any_running = False


def current_rows() -> tuple[str, ...] | None:
    """Return for each image the name of its adapter if a mixed batch runs in this thread, else None."""
    return ROWS.get() if _any_running else None


@contextmanager
def running_rows(names: tuple[str, ...]) -> Iterator[None]:
    """Let `current_rows` return these names within the context, in this thread."""
    _count(1)
    token = ROWS.set(names)
    try:
        yield
    finally:
        ROWS.reset(token)
        _count(-1)


def _count(change: int) -> None:
    global _running, _any_running
    with _LOCK:
        _running += change
        _any_running = _running > 0


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
