"""A subclass for one instance: methods that a model lacks, or that a hook cannot change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

# From a class to the attributes of its subclass.
Attributes = Callable[[Any], dict[str, Any]]


def add_methods(module: nn.Module, attributes: Attributes) -> None:
    """Make a module an instance of a subclass of its class.

    The subclass keeps name and module of the class, which PEFT and Transformers write into files.
    """
    base: Any = type(module)
    module.__class__ = _subclass(base, attributes)


def original_class(module: nn.Module) -> None:
    """Undo `add_methods`."""
    module.__class__ = type(module).__mro__[1]


@cache
def _subclass(base: Any, attributes: Attributes) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle and copy without the name of the class, under which pickle would find the original."""
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new, (base, attributes), *state

    own = {name: getattr(base, name) for name in ("__doc__", "__module__", "__qualname__")}
    made: Any = type(base.__name__, (base,), own | attributes(base) | {"__reduce_ex__": reduce})
    return made


def _new(base: Any, attributes: Attributes) -> Any:
    made = _subclass(base, attributes)
    return made.__new__(made)
