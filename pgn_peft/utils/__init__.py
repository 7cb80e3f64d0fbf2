"""Utilities for files, labels, Markdown and ONNX, and a cast for type checkers."""

from typing import TypeVar, cast

T = TypeVar("T")


def not_none(value: T | None) -> T:
    """Return `value`, for type checkers: it cannot be None here, as a field of a resolved config."""
    return cast(T, value)
