"""Linear probe: the accuracy of a head on the frozen model without prompts, the baseline of every adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.heads import TextHead, fit_ridge
from pgn_peft.tuner.adapters import find_layer, without_adapters
from pgn_peft.tuner.head import PGNHead, find_head


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy on the frozen model without prompts.

    Args:
        linear: of a linear head on the frozen features, fitted by ridge regression.
        own: of the model's own head, through the adapter's label mapping; None for an adapter with a head of its own.
    """

    linear: float
    own: float | None = None


@torch.no_grad()
def linear_probe(
    model: nn.Module,
    train_batches: Iterable[Mapping[str, Any]],
    eval_batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
) -> LinearProbe:
    """Measure the accuracy of heads without prompts. Costs a forward pass for each image.

    Args:
        model: a model with the adapter, trained or not.
        train_batches: the model's inputs, with `labels` (B,) of class indices, without augmentation.
        eval_batches: the same for the images to evaluate.
        adapter_name: the adapter. The labels are indices of its classes.

    Returns:
        The accuracies, on `eval_batches`.

    Raises:
        TypeError: the model carries no adapter.
        ValueError: no adapter has this name, or the model has no classification head.
    """
    config = find_layer(model, adapter_name).configs[adapter_name]
    head = find_head(model)
    if head is None or config.num_labels is None:
        raise ValueError("The model has no classification head. Give the adapter labels: PGNConfig(id2label=...).")
    with without_adapters(model):
        features, labels = _features(model, head, train_batches)
        others, expected = _features(model, head, eval_batches)
        own = None
        own_head = head.head(adapter_name)
        if isinstance(own_head, TextHead):
            own = _accuracy(own_head(others).cpu(), expected)
        elif own_head is None:
            own = _accuracy(head.classify(adapter_name, others).float().cpu(), expected)
    weight, bias, _ = fit_ridge(features.cpu(), labels, config.num_labels)
    return LinearProbe(_accuracy(others.double().cpu() @ weight.mT + bias, expected), own)


def _features(model: nn.Module, head: PGNHead, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head (N, F), and the labels (N,)."""
    device, features, labels = next(model.parameters()).device, [], []
    head.shows_features = True
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
    try:
        for batch in batches:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            labels.append(inputs.pop("labels").cpu())  # the frozen model has other classes
            model(**inputs)
    finally:
        head.shows_features = False
        hook.remove()
    return torch.cat(features), torch.cat(labels)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())
