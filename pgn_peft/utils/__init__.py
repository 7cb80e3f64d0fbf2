"""Small parts without torch modules: files, labels, Markdown, ONNX; and a word to type checkers."""

from typing import TypeVar, cast

T = TypeVar("T")


def not_none(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field of a resolved config."""
    return cast(T, value)
