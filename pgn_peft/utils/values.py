"""Checks of single values, with messages that name the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, cast, overload

T = TypeVar("T")


@overload
def read_integer(name: str, value: Any, minimum: int, maximum: int, optional: Literal[False] = False) -> int: ...


@overload
def read_integer(name: str, value: Any, minimum: int, maximum: int, optional: bool) -> int | None: ...


def read_integer(name: str, value: Any, minimum: int, maximum: int, optional: bool = False) -> int | None:
    """Return `value` as an int in minimum..maximum, or None where `optional`.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` lies outside of minimum..maximum.
    """
    if optional and value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, but got {value!r}. Use a whole number of at least {minimum}.")
    if not minimum <= int(value) <= maximum:
        raise ValueError(f"`{name}` must lie in {minimum}..{maximum}, but got {value!r}. Use a number in this range.")
    return int(value)


def filled(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field that an adapter's config has by now."""
    return cast(T, value)


def not_none(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field of a resolved config."""
    return cast(T, value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the strings `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. Choose one of {', '.join(choices)}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}. Choose one of these.")


def check_boolean(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but got {value!r}. Write one of these.")


def check_text(name: str, value: Any) -> None:
    """Raise unless `value` is a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. Leave it out if there is none.")


def check_texts(name: str, value: Any) -> None:
    """Raise unless `value` is a dictionary of strings, or None."""
    if value is not None and not (
        isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    ):
        raise TypeError(
            f"`{name}` must be a dictionary of strings, but got {value!r}. It is recorded when an adapter is made."
        )


def check_scale(name: str, value: Any, official: str, zero: bool = False) -> None:
    """Raise unless `value` is a number above 0, or 0 where `zero`, and at most 1000."""
    remedy = f"The official code uses {official}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, but got {value!r}. {remedy}")
    if not (0 < value <= 1000 or (zero and value == 0)):
        bound = "" if zero else ", above 0"
        raise ValueError(f"`{name}` must lie in 0..1000{bound}, but got {value!r}. {remedy}")


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a number from 0 to below 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, but got {value!r}. Leave it out for none.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in 0..1, below 1, but got {value!r}. Leave it out for none.")


def check_processor_settings(settings: Mapping[str, Any]) -> None:
    """Check the fields of an image processor's file. Transformers takes any text for True, and True for a number.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name.startswith("do_"):
            check_boolean(name, value)
        elif name in ("image_mean", "image_std"):
            read_channel_values(name, value if isinstance(value, list) else [value], positive=name == "image_std")
        elif name == "rescale_factor":
            check_scale(name, value, "1/255")
        elif name == "resample":
            read_integer(name, value, 0, 5)
        elif name in ("size", "crop_size"):
            for side in value.values() if isinstance(value, Mapping) else [value]:
                read_integer(name, side, 1, 65_536, optional=True)


def read_pair(name: str, value: Any, maximum: int) -> tuple[int, int]:
    """Return a list of two integers in 1..maximum as a tuple.

    Raises:
        TypeError: `value` is not a list of two integers.
        ValueError: one of them lies outside of 1..maximum.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"`{name}` must be a list of two integers, but got {value!r}. Write both.")
    return read_integer(name, value[0], 1, maximum), read_integer(name, value[1], 1, maximum)


def read_channel_values(name: str, value: Any, positive: bool) -> list[float]:
    """Return one finite number per channel, above 0 where `positive`.

    Raises:
        TypeError: `value` is not a list of numbers.
        ValueError: `value` is empty, or a number is out of range.
    """
    remedy = f"Copy it from the image processor: processor.{name}."
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(number, Real) and not isinstance(number, bool) for number in value
    ):
        raise TypeError(f"`{name}` must be a list with a number for each channel, but got {value!r}. {remedy}")
    numbers = [float(number) for number in value]
    smallest = 1e-6 if positive else -1000.0
    if not numbers or not all(smallest <= number <= 1000.0 for number in numbers):
        bound = "above 0" if positive else "finite"
        raise ValueError(f"`{name}` must hold {bound} numbers, one for each channel, but got {value!r}. {remedy}")
    return numbers


def read_indices(name: str, value: Any) -> list[int]:
    """Return a list of different integers of at least 0.

    Raises:
        TypeError: `value` is not a list of integers.
        ValueError: `value` is empty, or an integer is negative or repeated.
    """
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(index, Integral) and not isinstance(index, bool) for index in value
    ):
        raise TypeError(f"`{name}` must be a list of class indices, but got {value!r}. See `frequency_mapping`.")
    indices = [int(index) for index in value]
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if not indices or min(indices) < 0 or twice:
        found = f"{twice} more than once" if twice else repr(value)
        raise ValueError(
            f"`{name}` must give each of the adapter's classes one of the model's, all different, but got {found}. "
            "`frequency_mapping` makes such a list."
        )
    return indices


def read_names(name: str, value: Any) -> list[str] | None:
    """Return a list of module names, given as a list or as one string; None for None.

    Raises:
        TypeError: `value` is neither a list of names nor a string.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(item, str) and item for item in names):
        raise TypeError(f"`{name}` must be a list of module names, but got {value!r}. Give names as strings.")
    return sorted(names) if isinstance(names, set) else list(names)


def read_one_name(name: str, value: Any) -> list[str] | None:
    """Return a list of exactly one module name; None for None.

    Raises:
        TypeError: `value` is neither a list of names nor a string.
        ValueError: `value` holds several names, or none.
    """
    names = read_names(name, value)
    if names is not None and len(names) != 1:
        raise ValueError(
            f"`{name}` must name one module, the embeddings, but got {value!r}. Prompts are added in one place; leave "
            "it out for a supported architecture."
        )
    return names
