"""A learning rate for each part of an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.layer import PGNLayer


def library_ratio(config: PGNConfig) -> float:
    """Return the learning rate of an adapter's library as a multiple of its generator's, which suits its form."""
    if config.prompt_space == "pixel":
        return 30.0
    return 10.0 if config.prompt_depth == 1 else 3.0 if config.accumulate_prompts else 1.0


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
        library_learning_rate: of the token library (or static prompts); None: a multiple of `learning_rate` that was
            good in benchmarks/adaptation.py: 10 for prompts of the first layer, 3 for prompts of several
            layers (1 with `accumulate_prompts=False`), 30 in pixel space.
        head_learning_rate: of the classification head; None: three times `learning_rate`.
        weight_decay: of matrices and convolutions. Norms and biases are not decayed.

    Returns:
        Groups with the keys `name`, `params`, `lr` and `weight_decay`; each parameter is in exactly one.
    """
    head_rate = 3 * learning_rate if head_learning_rate is None else head_learning_rate
    rates = {"pgn_generator": learning_rate, "pgn_head": head_rate}
    for layer in (module for module in model.modules() if isinstance(module, PGNLayer)):
        for adapter, config in layer.configs.items():
            rates[f"pgn_library.{adapter}"] = (
                library_ratio(config) * learning_rate if library_learning_rate is None else library_learning_rate
            )
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in rates if f".{part}." in f".{name}"), "other")
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "name": part.split(".")[0],
            "params": parameters,
            "lr": rates.get(part, learning_rate),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in groups.items()
    ]
