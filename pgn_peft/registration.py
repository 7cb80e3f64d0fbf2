"""Registers PGN with PEFT. No other module uses PEFT's mappings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

PEFT_FLOOR = "0.21.0"


def check_peft() -> None:
    """Refuse a PEFT that is too old.

    Raises:
        ImportError: PEFT is older than `PEFT_FLOOR`.
    """
    found = version("peft")
    if Version(found) < Version(PEFT_FLOOR):
        raise ImportError(
            f"`peft` must be at least {PEFT_FLOOR}, but got {found}, which would save adapters without their weights. "
            "Run: pip install -U peft"
        )


def register() -> None:
    """Register PGN in PEFT's mappings, for `get_peft_model` and all loaders. Can be called again.

    Raises:
        ImportError: another package has taken the method's name.
    """
    import peft.mapping
    from peft.utils import peft_types

    from pgn_peft.tuner.config import PGNConfig, PGNPeftType
    from pgn_peft.tuner.model import PGNModel

    name = PGNPeftType.PGN.value
    mapping: Any = peft.mapping  # its keys are annotated as members of PEFT's enum
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if taken is not None and not _is_ours(taken, PGNConfig):
        raise ImportError(
            f"`{name}` must not be registered with PEFT yet, but got {taken.__module__}.{taken.__qualname__}. Import "
            "either that package or pgn_peft, not both."
        )
    owners = [key for key, prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == PGNModel.prefix]
    if any(owner != name for owner in owners):
        raise ImportError(
            f"`{PGNModel.prefix}` must not be another method's prefix in PEFT, but got it from {owners[0]}. Import "
            "either that package or pgn_peft, not both."
        )
    if name in [member.value for member in peft_types.PeftType] and taken is None:
        # A later PEFT has the name: use its official function.
        peft_types.register_peft_method(name=name.lower(), config_cls=PGNConfig, model_cls=PGNModel)
        return
    # `register_peft_method` accepts only members of PEFT's own enum; this is what it does otherwise.
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PGNPeftType.PGN] = PGNModel.prefix
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PGNPeftType.PGN] = PGNConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PGNPeftType.PGN] = PGNModel


def _is_ours(taken: type, ours: type) -> bool:
    # By name: after a reload the class is another object.
    return (taken.__module__, taken.__qualname__) == (ours.__module__, ours.__qualname__)
