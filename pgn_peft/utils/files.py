"""Files: saving that replaces old ones only when the new ones are complete, and settings that are read from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def is_folder(name: str | Path) -> bool:
    """Whether there is a folder of this name; False for what is too long to be one."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file that is not trusted.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file does not hold a JSON object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, nested too deeply
        settings, found = None, str(error)
    else:
        found = type(settings).__name__
    if not isinstance(settings, dict):
        raise ValueError(
            f"`{file.name}` must be a JSON object, but got {found} in {str(file.parent)!r}. Save or fetch it again."
        )
    return settings
