"""A learning rate for each part of an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    library_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for a torch optimizer.

    Args:
        model: a model with PGN adapters.
        learning_rate: of the generator, and of all modules in `modules_to_save`.
        library_learning_rate: of the token library (or static prompts); None: `learning_rate`.
        head_learning_rate: of the classification head; None: `learning_rate`.
        weight_decay: of matrices and convolutions. Norms and biases are not decayed.

    Returns:
        Groups with the keys `name`, `params`, `lr` and `weight_decay`; each parameter is in exactly one.

    Raises:
        ValueError: no parameter is trainable.
    """
    rates = {
        "pgn_generator": learning_rate,
        "pgn_library": learning_rate if library_learning_rate is None else library_learning_rate,
        "pgn_head": learning_rate if head_learning_rate is None else head_learning_rate,
        "other": learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in rates if f".{part}." in f".{name}"), "other")
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(
            "`model` must have trainable parameters, but got a frozen one. Load the adapter with is_trainable=True, "
            "or activate it: model.set_adapter(name)."
        )
    return [
        {"name": part, "params": parameters, "lr": rates[part], "weight_decay": weight_decay if decayed else 0.0}
        for (part, decayed), parameters in groups.items()
    ]
