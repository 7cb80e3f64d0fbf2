"""Checksums of the files of an adapter or a prompter: recorded in its configuration, compared when it is loaded.

A flipped bit in a weight is another valid weight, and one in "softmax" another name: nothing but a checksum finds it.
They find damage. They are no signature: whoever exchanges a file on purpose can record another checksum.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

# The configuration's field: SHA-256 by the name of the file. Under the configuration's own name: of its other fields.
# Under "pgn_head" and the like: of this part's tensors, for a loader that does not tell which file it has read.
FIELD = "checksums"
REMEDY = (
    "It was damaged, or changed after it was saved. Fetch or copy the files again; if you changed it on purpose, "
    f"remove `{FIELD}` from {{config}}, load the files and save them again."
)

Config = TypeVar("Config", bound=Any)


def record(config_file: Path, files: Iterable[Path] = (), parts: Mapping[str, str] | None = None) -> None:
    """Write into a configuration the checksums of its fields and of the files that belong to it.

    Args:
        config_file: a JSON object; checksums that it has are replaced.
        files: all complete on the disk.
        parts: checksums of parts of them.
    """
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    settings[FIELD] = {file.name: _of_file(file) for file in files} | dict(parts or {})
    settings[FIELD][config_file.name] = _of_settings(settings, config_file.name)
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def compare_settings(settings: Mapping[str, Any], config_name: str) -> None:
    """Compare the fields of a configuration with their checksum, if there is one.

    Args:
        settings: as JSON has them, with the checksums.
        config_name: name of the file.

    Raises:
        ValueError: a field differs from what was saved, or one is missing.
    """
    found = settings.get(FIELD)
    if found is None:
        return
    expected = _of_settings(settings, config_name) if isinstance(found, dict) else None
    if expected is None or found.get(config_name) != expected:
        raise ValueError(
            f"`{config_name}` must hold the fields that were saved, but got others, or a damaged `{FIELD}`. "
            + REMEDY.format(config=config_name)
        )


def compare_file(
    file: Path, checksums: Mapping[str, str] | None, config_name: str, content: bytes | None = None
) -> None:
    """Compare a file with its checksum, if there is one.

    Args:
        file: the file.
        checksums: by name, from the configuration.
        config_name: name of the configuration's file, for the message.
        content: what was read from the file; None: it is read.

    Raises:
        ValueError: the file is missing, or its content differs from what was saved.
    """
    expected = (checksums or {}).get(file.name)
    if expected is None:
        return
    if content is not None:
        found = hashlib.sha256(content).hexdigest()
    else:
        found = _of_file(file) if file.is_file() else "no such file"
    if found != expected:
        raise ValueError(
            f"`{file}` must have the SHA-256 checksum {expected}, which was recorded when it was saved, but got "
            f"{found}. " + REMEDY.format(config=config_name)
        )


def of_tensors(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the checksum of named tensors, floats as float32; None where one is of a kind that shows no values."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if type(tensor) is not Tensor or tensor.is_meta:
            return None
        if tensor.is_floating_point():
            tensor = tensor.float()
        checksum.update(f"{name} {tuple(tensor.shape)}\n".encode())
        checksum.update(tensor.cpu().contiguous().numpy().tobytes())
    return checksum.hexdigest()


def compare_part(part: str, tensors: Mapping[str, Tensor], expected: str, config_name: str) -> None:
    """Compare tensors in a model with the checksum of those that were saved.

    Not where they are in half precision, to which a loader may have rounded them, on the meta device, or sharded.

    Args:
        part: name of the part.
        tensors: a module's state.
        expected: the part's checksum.
        config_name: name of the configuration's file, for the message.

    Raises:
        ValueError: the checksums differ.
    """
    if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors.values()):
        return
    found = of_tensors(tensors)
    if found not in (None, expected):
        raise ValueError(
            f"`{part}` must hold the weights that were saved, with the checksum {expected}, but got {found}. "
            + REMEDY.format(config=config_name)
        )


def with_checksums(config_name: str) -> Any:
    """Let a configuration's constructor take the field `checksums` of its file, and compare the other fields with it.

    PEFT and Transformers read the file themselves and pass its fields to the constructor, so this is the only place
    that sees them all. The checksums of other files and of parts are kept as `saved_checksums`; that is no field,
    since they describe files, and not the adapter that the configuration is used for next.

    Args:
        config_name: name of the configuration's file.

    Returns:
        A decorator for a dataclass. The constructor raises ValueError where a field differs from what was saved.
    """

    def decorate(config_class: type[Config]) -> type[Config]:
        init = config_class.__init__

        @functools.wraps(init)
        def __init__(self: Config, *args: Any, checksums: Any = None, **fields: Any) -> None:  # noqa: N807
            settings = fields | {FIELD: checksums}
            if not fields.keys() <= config_class.__dataclass_fields__.keys():
                # PEFT leaves out fields that the constructor refuses, and so would take a misspelt one's default.
                compare_settings(settings, config_name)
            # First the checks of single fields: they say more about a file that was edited.
            init(self, *args, **fields)
            compare_settings(settings, config_name)
            self.saved_checksums = checksums or {}

        config_class.__init__ = __init__
        return config_class

    return decorate


def _of_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _of_settings(settings: Mapping[str, Any], config_name: str) -> str:
    """Return the checksum of all fields, the checksums of other files among them, whatever their order and layout."""
    others = {name: checksum for name, checksum in settings[FIELD].items() if name != config_name}
    text = json.dumps({**settings, FIELD: others}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
