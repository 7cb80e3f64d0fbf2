"""Mixed batches: a different adapter for each image, `model(pixel_values, adapter_names=[...])`.

A ViT lets every token see every other, so images share a pass through it only if they have equally many tokens. The
batch is cut into groups that do; inside a group each image gets its own adapter's prompts and head in one pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.batch_adapters import BASE, current_rows, restore_order, running_rows
from pgn_peft.tuner.head import PGNHead
from pgn_peft.tuner.layer import PGNLayer

_LOCK = threading.Lock()


@contextmanager
def mixed_batch(
    tuner: BaseTuner, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Within the context, and in this thread only, run the tuner's model on a batch with an adapter for each image.

    Threads may do so side by side on one model, as long as none of them adds, activates or deletes an adapter.

    Args:
        tuner: the `PGNModel` around the model that will be called.
        adapter_names: for each image the name of its adapter, or "__base__".
        args: what the model will be called with, by position.
        kwargs: and by name.

    Raises:
        TypeError: `adapter_names` is no list of strings, or `pixel_values` no tensor.
        ValueError: the model is in training mode; a name is unknown; there are more or fewer names than images; the
            adapters have different labels or modules of their own; or another argument would have to be cut too.
    """
    names = _check_names(tuner, adapter_names)
    layer = prompt_layer(tuner)
    layer.check_inputs(tuner.model, args, dict(kwargs))
    _check_arguments(names, args, kwargs)
    _install(tuner.model, layer)
    try:
        with running_rows(names):
            yield
    finally:
        _remove(tuner.model)


def _check_names(tuner: BaseTuner, adapter_names: Any) -> tuple[str, ...]:
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(
            f"`adapter_names` must be a list with a name for each image, but got {adapter_names!r}. Write "
            f"[name] * len(pixel_values), or use set_adapter for one adapter; {BASE!r} is the model without any."
        )
    if tuner.training:
        raise ValueError(
            f"`adapter_names` must be used in eval mode, but got {list(adapter_names)!r} in training mode. Call "
            "model.eval(); an adapter is trained as the active one: set_adapter."
        )
    names = tuple(adapter_names)
    configs = tuner.peft_config
    unknown = [name for name in dict.fromkeys(names) if name != BASE and name not in configs]
    if unknown:
        raise ValueError(
            f"`adapter_names` must hold loaded adapters, {', '.join((*configs, BASE))}, but got "
            f"{', '.join(map(repr, unknown))}. Load it first: load_adapter(path, adapter_name)."
        )
    for name, config in configs.items():
        if config.modules_to_save:
            raise ValueError(
                f"`adapter_names` must not be used beside an adapter with `modules_to_save`, but got {name!r}, which "
                f"has {config.modules_to_save!r}: it would answer for all images. Delete it, or use set_adapter."
            )
    _check_labels(tuner, names)
    return names


def _check_labels(tuner: BaseTuner, names: Sequence[str]) -> None:
    head = next((module for module in tuner.modules() if isinstance(module, PGNHead)), None)
    if head is None or not names:
        return
    labels = {name: (head.base_labels if name == BASE else head.labels[name]).id2label for name in names}
    first, *others = labels
    for name in others:
        if labels[name] != labels[first]:
            described = [f"{key!r} with {', '.join([*labels[key].values()][:5])}" for key in (first, name)]
            raise ValueError(
                f"`adapter_names` must name adapters with the same labels in one batch, but got "
                f"{' and '.join(described)}. Their logits do not fit into one tensor; use a batch for each."
            )


def _check_arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    batch_size = len(args[0] if args else kwargs["pixel_values"])
    if len(names) != batch_size:
        raise ValueError(
            f"`adapter_names` must have a name for each of the {batch_size} images, but got {len(names)}. Repeat a "
            "name for each image that it is for."
        )
    further = {f"argument {place}": value for place, value in enumerate(args) if place} | dict(kwargs)
    for name, value in further.items():
        if isinstance(value, Tensor) and name != "pixel_values":
            raise ValueError(
                f"`{name}` must be left out with `adapter_names`, but got a tensor {tuple(value.shape)}. A mixed "
                "batch is for inference; compute a loss from its logits."
            )


class _GroupedForward:
    """Stands in for a model's `forward`: by groups where this thread runs a mixed batch, as it was in all others."""

    def __init__(self, model: nn.Module, layer: PGNLayer) -> None:
        self.before = vars(model).get("forward")
        self.plain: Callable[..., Any] = model.forward
        self.layer = layer
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = current_rows()
        if names is None:
            return self.plain(*args, **kwargs)
        pixel_values = args[0] if args else kwargs.pop("pixel_values")
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(self.layer.token_counts(name, tuple(pixel_values.shape[-2:])), []).append(row)
        if len(groups) < 2:
            return self.plain(pixel_values, *args[1:], **kwargs)
        outputs = []
        for rows in groups.values():
            with running_rows(tuple(names[row] for row in rows)):
                outputs.append(self.plain(pixel_values[rows], *args[1:], **kwargs))
        places = [row for rows in groups.values() for row in rows]
        return _join(outputs, places, "outputs")


def _install(model: nn.Module, layer: PGNLayer) -> None:
    with _LOCK:
        forward = vars(model).get("forward")
        if not isinstance(forward, _GroupedForward):
            forward = model.forward = _GroupedForward(model, layer)
        forward.users += 1


def _remove(model: nn.Module) -> None:
    with _LOCK:
        forward = model.forward
        forward.users -= 1
        if forward.users == 0:
            del model.forward
            if forward.before is not None:
                model.forward = forward.before


def _join(parts: Sequence[Any], places: Sequence[int], name: str) -> Any:
    """Put the groups' outputs together, whatever they are nested in, and their rows in order."""
    first = parts[0]
    if isinstance(first, Mapping):
        return type(first)(**{key: _join([part[key] for part in parts], places, key) for key in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_join(entries, places, name) for entries in zip(*parts, strict=True))
    if not isinstance(first, Tensor):
        return first
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(str(tuple(part.shape[1:])) for part in parts)
        raise ValueError(
            f"`adapter_names` must name adapters with equally many prompts where `{name}` is returned, but got "
            f"{shapes} for one image. Leave that output out, or use a batch for each number of prompts."
        )
    return torch.cat(list(parts))[restore_order(places, first.device)]
