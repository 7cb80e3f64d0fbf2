"""A context in which a module is in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and each of its parts back into its own mode afterwards.

    Also computes in the weights' precision: Accelerate leaves its mixed precision in a model's `forward`.
    """
    modes = [(part, part.training) for part in module.modules()]
    mixed = [(part, part.__dict__["forward"]) for part in module.modules() if "_original_forward" in part.__dict__]
    module.eval()
    try:
        for part, _ in mixed:
            part.forward = part._original_forward  # type: ignore[assignment]  # torch knows tensors and modules only
        yield
    finally:
        for part, forward in mixed:
            part.forward = forward
        for part, training in modes:
            part.training = training
