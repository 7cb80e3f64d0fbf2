"""Mixed batches: a different adapter for each image, `model(pixel_values, adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.batch_adapters import BASE, running_batch
from pgn_peft.tuner.head import find_head
from pgn_peft.tuner.layer import PGNLayer


@contextmanager
def mixed_batch(
    tuner: BaseTuner, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Give each image of a batch its own adapter, within the context and in this thread only.

    Threads may do so side by side on one model, as long as none of them adds, activates or deletes an adapter.

    Args:
        tuner: the `PGNModel` around the model that will be called.
        adapter_names: for each image the name of its adapter, or "__base__".
        args: positional arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        TypeError: `adapter_names` is not a list of strings, or `pixel_values` is not a tensor.
        ValueError: the model is in training mode; a name is unknown; there are more or fewer names than images; the
            adapters have different labels, other numbers of tokens, or modules of their own; or another argument is a
            tensor.
    """
    names = _check_names(tuner, adapter_names)
    layer = prompt_layer(tuner)
    layer.check_inputs(tuner.model, args, dict(kwargs))
    _check_arguments(names, args, kwargs)
    pixel_values = args[0] if args else kwargs["pixel_values"]
    _check_token_counts(layer, names, tuple(pixel_values.shape[-2:]))
    with running_batch(names):
        yield


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
    configs: Mapping[str, Any] = tuner.peft_config
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
    head = find_head(tuner)
    if head is None or not names:
        return
    labels = {name: head.labels(None if name == BASE else name).id2label for name in names}
    with_texts = head.texts_of_base(names)
    if head.is_added and BASE in labels and with_texts is not None:
        labels[BASE] = head.labels(with_texts).id2label  # zero-shot
    first, *others = labels
    for name in others:
        if labels[name] != labels[first]:
            described = [
                f"{key!r} with {', '.join([*labels[key].values()][:5]) or 'features'}" for key in (first, name)
            ]
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


def _check_token_counts(layer: PGNLayer, names: Sequence[str], image_size: tuple[int, int]) -> None:
    counts = {name: layer.token_counts(name, image_size) for name in names}
    first, *others = counts or [BASE]
    for name in others:
        if counts[name] != counts[first]:
            described = " and ".join(f"{key!r} ({_describe_tokens(*counts[key])})" for key in (first, name))
            raise ValueError(
                f"`adapter_names` must name adapters with equally many tokens in one batch, but got {described}. "
                "All tokens of a ViT attend to each other, so these images cannot share a pass; use a batch for each."
            )


def _describe_tokens(height: int, width: int, num_prompts: int, depth: int) -> str:
    layers = "" if depth == 1 else f" in each of {depth} layers"
    return f"images of {height} x {width} pixels, {num_prompts} prompts{layers}"
