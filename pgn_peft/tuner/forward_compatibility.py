"""Forward compatibility: adapters of newer versions load if the fields that are unknown here are off."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.version import InvalidVersion, Version

from pgn_peft.version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def is_newer(version: Any) -> bool:
    """Return True if `version` is valid and newer than this package; False otherwise."""
    try:
        return Version(version) > Version(__version__)
    except (TypeError, InvalidVersion):
        return False


def check_version(name: str, value: Any) -> None:
    """Raise unless `value` is a valid version of a Python package."""
    remedy = "Leave it out; it is recorded when an adapter is made."
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. {remedy}")
    try:
        Version(value)
    except InvalidVersion:
        raise ValueError(f"`{name}` must be a version like 0.1.0, but got {value!r}. {remedy}") from None


@contextmanager
def name_newer(version: Any) -> Iterator[None]:
    """Add to errors about an adapter of a newer version that this version may be too old."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not is_newer(version):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{error} {_made_by(version)}") from error


def reads_newer(config_class: type[Config]) -> type[Config]:
    """Let a config's constructor accept fields of newer versions if they are off.

    PEFT and Transformers both pass the fields of a file to the constructor. A field is off at None, False, 0 or empty;
    with these values every new field must keep the behaviour of earlier versions.

    Args:
        config_class: a dataclass with the field `pgn_peft_version`.

    Returns:
        The same class. Its constructor raises ValueError for an unknown field that is on, and warns of one that is
        off.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    init = config_class.__init__

    @functools.wraps(init)
    def __init__(self: Config, *args: Any, **fields: Any) -> None:  # noqa: N807
        version = fields.get("pgn_peft_version")
        unknown = {name: value for name, value in fields.items() if name not in known} if is_newer(version) else {}
        for name, value in unknown.items():
            if value:
                raise ValueError(
                    f"`{name}` must be off in this version of pgn_peft, which does not know it, but got {value!r}. "
                    + _made_by(version)
                )
        if unknown:
            listed = ", ".join(f"`{name}`" for name in sorted(unknown))
            warnings.warn(f"Leaving out {listed}, which this version does not know. {_made_by(version)}", stacklevel=2)
        with name_newer(version):
            init(self, *args, **{name: value for name, value in fields.items() if name not in unknown})

    config_class.__init__ = __init__  # type: ignore[assignment, method-assign]  # a decorator wraps it
    return config_class


def _made_by(version: Any) -> str:
    return (
        f"The adapter was made by pgn_peft {version}, newer than this one, {__version__}. Run: pip install -U pgn-peft"
    )
