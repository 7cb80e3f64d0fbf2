"""Values that are known not to be None, and a check of an image processor's file."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar, cast

T = TypeVar("T")


def filled(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field that an adapter's config has by now."""
    return cast(T, value)


def not_none(value: T | None) -> T:
    """Return a value that is never None at this point, such as a field of a resolved config."""
    return cast(T, value)


def check_processor_settings(settings: Mapping[str, Any]) -> None:
    """Check the fields of an image processor's file. Transformers takes any text for True, and True for a number.

    Raises:
        ValueError: a field has the wrong type, or an impossible value.
    """
    for name, value in settings.items():
        values = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        if name.startswith("do_"):
            right = isinstance(value, bool)
        elif name in ("image_mean", "image_std", "rescale_factor"):
            right = _lie_between(-1000 if name == "image_mean" else 1e-6, values, 1000)
        elif name == "resample":
            right = _lie_between(0, values, 5)
        elif name in ("size", "crop_size"):
            right = _lie_between(1, [side for side in values if side is not None], 65_536)
        else:
            continue
        if value is not None and not right:
            raise ValueError(f"`{name}` of the image processor is {value!r}. Save or fetch the processor again.")


def _lie_between(smallest: float, values: list[Any], largest: float) -> bool:
    """Whether values are numbers from `smallest` to `largest`, at least one of them."""
    numbers = [value for value in values if isinstance(value, Real) and not isinstance(value, bool)]
    return len(numbers) == len(values) > 0 and all(smallest <= number <= largest for number in numbers)
