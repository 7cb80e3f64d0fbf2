"""Tells type checkers that a value is not None."""

from __future__ import annotations

from typing import TypeVar, cast

T = TypeVar("T")


def not_none(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field of a resolved config."""
    return cast(T, value)
