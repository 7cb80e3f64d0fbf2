"""Mixed batches: a different adapter for each image, `model(pixel_values, adapter_names=[...])`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# PEFT's name for the model without an adapter.
BASE = "__base__"


@dataclass
class _MixedBatch:
    """A batch whose images have adapters of their own.

    Args:
        names: of each image's adapter.
        passes: rows of the images that go through the model together.
        running: names of the adapters of the current pass's images.
        inputs: positional and keyword arguments of the whole batch.
    """

    names: tuple[str, ...]
    passes: list[list[int]]
    running: tuple[str, ...]
    inputs: tuple[Any, dict[str, Any]] = field(default=((), {}))


# By thread. Empty where none runs a mixed batch, which is what a compiled model is specialised on.
_BATCHES: dict[int, _MixedBatch] = {}


def adapters_of_batch() -> tuple[str, ...] | None:
    """Return for each image the name of its adapter if this thread runs a mixed batch, else None."""
    batch = _BATCHES.get(threading.get_ident()) if _BATCHES else None
    return None if batch is None else batch.running


@contextmanager
def running_batch(names: Sequence[str], fit_key: Callable[[str], Hashable]) -> Iterator[None]:
    """Give each image of a batch its own adapter, within the context and in this thread only.

    Threads may do so side by side on one model, as long as none of them adds, activates or deletes an adapter.

    Args:
        names: for each image the name of its adapter, or "__base__".
        fit_key: a function of an adapter's name. Images whose adapters have the same key share a pass.
    """
    passes: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        passes.setdefault(fit_key(name), []).append(row)
    thread = threading.get_ident()
    _BATCHES[thread] = _MixedBatch(tuple(names), list(passes.values()), tuple(names))
    try:
        yield
    finally:
        del _BATCHES[thread]


def split_batch(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Leave the model the images of the first of several passes; a forward pre-hook. `join_passes` runs the others."""
    batch = _BATCHES.get(threading.get_ident()) if _BATCHES else None
    if batch is None or len(batch.passes) < 2 or batch.running != batch.names:
        return None
    batch.inputs = args, kwargs
    return _start_pass(batch, batch.passes[0])


def join_passes(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Run the other passes of a mixed batch, and put their outputs together; a forward hook.

    An adapter with fewer labels than another one in the batch has logits of minus infinity for the rest.

    Raises:
        ValueError: an output besides the logits has another shape in one of the passes.
    """
    batch = _BATCHES.get(threading.get_ident()) if _BATCHES else None
    if batch is None or len(batch.passes) < 2 or (not batch.inputs[0] and not batch.inputs[1]):
        return output
    inputs, passes = batch.inputs, batch.passes
    outputs = [output]
    batch.passes = []  # so that the calls below are single passes
    for rows in passes[1:]:
        batch.inputs = inputs
        some_args, some_kwargs = _start_pass(batch, rows)
        outputs.append(model(*some_args, **some_kwargs))
    order = torch.tensor([row for rows in passes for row in rows]).argsort()
    return _join(outputs, order)


def _start_pass(batch: _MixedBatch, rows: list[int]) -> tuple[Any, dict[str, Any]]:
    args, kwargs = batch.inputs
    batch.running = tuple(batch.names[row] for row in rows)
    if args:
        return (args[0][rows], *args[1:]), kwargs
    return args, {**kwargs, "pixel_values": kwargs["pixel_values"][rows]}


def _join(outputs: Sequence[Any], order: Tensor) -> Any:
    """Join the outputs of several passes, and bring the images into the order of the batch."""
    first = outputs[0]
    if isinstance(first, Mapping):
        return type(first)(**{name: _join([output[name] for output in outputs], order) for name in first})
    if isinstance(first, (tuple, list)):
        return tuple(_join(parts, order) for parts in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    if first.ndim == 2:
        widest = max(output.shape[1] for output in outputs)
        outputs = [F.pad(output, (0, widest - output.shape[1]), value=-torch.inf) for output in outputs]
    if any(output.shape[1:] != first.shape[1:] for output in outputs) and first.ndim != 2:
        raise ValueError(
            "The adapters of this mixed batch add different numbers of prompts, so hidden states and attentions do "
            "not fit into one tensor. Leave those outputs out, or run a batch for each adapter."
        )
    return torch.cat(list(outputs))[order.to(first.device)]


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
