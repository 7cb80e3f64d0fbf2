"""Linear heads in closed form: on the frozen model, the baseline of every adapter, and on a trained adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.functional import evaluating
from pgn_peft.nn.heads import TextHead, fit_ridge
from pgn_peft.tuner.adapters import find_layer, without_adapters
from pgn_peft.tuner.head import find_head


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
        head.shows_features = True
        try:
            features, labels = extract_features(model, head, train_batches)
            others, expected = extract_features(model, head, eval_batches)
        finally:
            head.shows_features = False
        own, own_head = None, head.head(adapter_name)
        on_device = others.to(next(model.parameters()).device)
        if isinstance(own_head, TextHead):
            own = _accuracy(own_head(on_device).cpu(), expected)
        elif own_head is None:
            own = _accuracy(head.classify(adapter_name, on_device).float().cpu(), expected)
    weight, bias, _ = fit_ridge(features, labels, config.num_labels)
    return LinearProbe(_accuracy(others.double() @ weight.mT + bias, expected), own)


@torch.no_grad()
def refit_head(
    model: nn.Module,
    train_batches: Iterable[Mapping[str, Any]],
    eval_batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
) -> tuple[float, float]:
    """Fit a trained adapter's head once more, by ridge regression on its final features, and keep the better head.

    The head that is trained beside prompts is often not finished when they are. Costs a forward pass for each image.

    Args:
        model: a model with a trained adapter, for one class for each image.
        train_batches: the model's inputs, with `labels` (B,) of class indices, without augmentation.
        eval_batches: the same for the images that decide which head is kept; prompts fit the training images too well.
        adapter_name: the adapter, which is active.

    Returns:
        The accuracies on `eval_batches` of the trained head and of the fitted one.

    Raises:
        ValueError: the adapter has no linear head of its own.
    """
    head = find_head(model)
    linear = None if head is None else head.head(adapter_name)
    if head is None or not isinstance(linear, nn.Linear):
        raise ValueError(f"The adapter {adapter_name!r} has no linear head of its own to fit again.")
    with evaluating(model):
        features, labels = extract_features(model, head, train_batches)
        others, expected = extract_features(model, head, eval_batches)
    weight, bias, _ = fit_ridge(features, labels, linear.out_features)
    trained = _accuracy(linear(others.to(linear.weight)).cpu(), expected)
    fitted = _accuracy(others.double() @ weight.mT + bias, expected)
    if fitted > trained:
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return trained, fitted


@torch.no_grad()
def extract_features(model: nn.Module, head: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Compute the features that a head is given, by the model in the mode that it is in.

    Args:
        model: with or without adapters.
        head: its module that maps features to logits.
        batches: the model's inputs, with `labels` (B,).

    Returns:
        Features (N, F) in float32 and labels (N,), on the CPU.
    """
    device, features, labels = next(model.parameters()).device, [], []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        for batch in batches:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            labels.append(inputs.pop("labels").cpu())  # the frozen model has other classes
            model(**inputs)
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(labels)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())
