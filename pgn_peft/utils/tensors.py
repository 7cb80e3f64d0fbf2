"""The comparison of a file's tensors with the expected ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def compare_tensors(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    source: str,
    holds: str = "the tensors of the adapter that its config describes",
    remedy: str = "Weights and configuration do not belong together, or the file was damaged; fetch both again.",
) -> None:
    """Compare names, shapes and values of tensors with the expected ones. PEFT warns at most.

    Args:
        expected: tensors of the right names, shapes and kinds (floating-point or not).
        found: the tensors to load; on the meta device if their values are not to be checked.
        source: what `found` is, for the message.
        holds: what it must hold, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape or kind, or holds NaN or infinity.
    """
    problems = [f"{name} is not part of it" for name in sorted(found) if name not in expected]
    problems += [f"{name} is missing" for name in sorted(expected) if name not in found]
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            problems.append(f"{name} has the shape {shapes}")
        elif found[name].is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name} holds {found[name].dtype} instead of {expected[name].dtype}")
        elif found[name].is_floating_point() and not found[name].is_meta and not torch.isfinite(found[name]).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"`{source}` must hold {holds}, but got others: {listed}. {remedy}")
