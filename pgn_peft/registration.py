"""Registers PGN with PEFT. No other module uses PEFT's mappings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

PEFT_FLOOR = "0.21.0"


def check_peft() -> None:
    """Check the version of PEFT.

    Raises:
        ImportError: PEFT is older than `PEFT_FLOOR`.
    """
    found = version("peft")
    if Version(found) < Version(PEFT_FLOOR):
        raise ImportError(
            f"PEFT {found} would save adapters without their weights: {PEFT_FLOOR} or later is needed. Run: "
            "pip install -U peft"
        )


def register() -> None:
    """Register PGN in PEFT's mappings, for `get_peft_model` and all loaders. Can be called again.

    Raises:
        ImportError: another package has taken the method's name.
    """
    import peft.mapping

    from pgn_peft.tuner.config import PGNConfig, PGNPeftType
    from pgn_peft.tuner.model import PGNModel

    mapping: Any = peft.mapping  # its keys are annotated as members of PEFT's enum
    registered = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(PGNPeftType.PGN.value, PGNConfig)
    if registered.__module__ != PGNConfig.__module__:  # by name, as a reload makes a new class object
        raise ImportError(f"{registered} is registered with PEFT as 'PGN' already. Import only one of the packages.")
    # `register_peft_method` accepts only members of PEFT's own enum; this is what it does otherwise.
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PGNPeftType.PGN] = PGNModel.prefix
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PGNPeftType.PGN] = PGNConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PGNPeftType.PGN] = PGNModel
