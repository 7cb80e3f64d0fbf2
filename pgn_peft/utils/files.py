"""Files: saving that replaces old ones only when the new ones are complete, and settings that are read from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder. The files written into it then replace those of the same names in `folder`.

    Where writing fails, the old files are unchanged. Each file is replaced atomically, JSON after the rest.

    Args:
        folder: is made. Files of other names in it are left alone.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staged:
        yield Path(staged)
        for file in sorted(Path(staged).iterdir(), key=lambda file: file.suffix == ".json"):
            os.replace(file, folder / file.name)


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file does not hold a JSON object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"it holds a {type(settings).__name__}")
    except (ValueError, TypeError, RecursionError) as error:  # not UTF-8 or JSON, or nested too deeply
        raise ValueError(f"{file} is not a JSON object: {error}. Save or fetch it again.") from error
    return settings


def compare_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, remedy: str = "Fetch both again."
) -> None:
    """Compare names, shapes and values of tensors with the expected ones.

    Args:
        expected: tensors of the right names, shapes and kinds (floating-point or not).
        found: the tensors to load; on the meta device if their values are not to be checked.
        source: what `found` is, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape or kind, or holds NaN or infinity.
    """
    problems = [f"{name} is not part of it" for name in sorted(found) if name not in expected]
    problems += [f"{name} is missing" for name in sorted(expected) if name not in found]
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            problems.append(f"{name} has the shape {shapes}")
        elif found[name].is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name} holds {found[name].dtype} instead of {expected[name].dtype}")
        elif found[name].is_floating_point() and not found[name].is_meta and not torch.isfinite(found[name]).all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{source} is damaged, or does not belong to its configuration: {listed}. {remedy}")
