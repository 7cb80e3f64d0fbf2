"""Saving that can be interrupted: new files take the place of old ones all together, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# In the folder that is saved to: the files of a complete save that have not been moved to their places yet.
COMPLETE = ".complete-save"
STAGED = ".unfinished-save-"
# Other processes that save to the same folder at the same time, before this one gives up.
ATTEMPTS = 100


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder. The files written into it then replace those of the same names in `folder`.

    A process that is killed leaves the old files, or all of the new ones: those are complete on the disk before the
    first is moved, and `finish_save` moves what is left. What an interrupted save has not completed stays in a folder
    whose name begins with ".unfinished-save-", which can be removed.

    Args:
        folder: is made. Files of other names in it are left alone.

    Raises:
        OSError: the folder cannot be written to, or the disk is full. The old files are unchanged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=folder))
        try:
            yield staged
            for file in staged.iterdir():
                _flush(file)
            _complete(staged, folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"`save_directory` must be a folder that can be written to, but got {str(folder)!r}: {error}. Free space, "
            "or choose another one. What was saved there before is unchanged."
        ) from error
    finish_save(folder)


def finish_save(folder: Path) -> None:
    """Complete a save that was interrupted while its files were moved to their places.

    Loaders call it first. Does nothing where no save was interrupted.

    Raises:
        OSError: the files cannot be moved.
    """
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    try:
        for file in complete.iterdir():
            with suppress(FileNotFoundError):  # another process has moved it
                os.replace(file, folder / file.name)
    except FileNotFoundError:
        pass  # another process has moved all of them
    except OSError as error:
        raise OSError(
            f"`{folder}` must be a folder that can be written to, because a save into it was interrupted, but got: "
            f"{error}. Move the files in {complete} into it, in place of those of the same names."
        ) from error
    with suppress(OSError):  # not empty: another process's next save
        complete.rmdir()


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


def _complete(staged: Path, folder: Path) -> None:
    """Declare a save complete, after those that other processes have completed."""
    for attempt in range(ATTEMPTS):
        finish_save(folder)
        try:
            os.replace(staged, folder / COMPLETE)
        except OSError:  # another process has completed a save of its own in between
            if attempt + 1 == ATTEMPTS:
                raise
        else:
            return


def _flush(file: Path) -> None:
    """Have the disk hold a file's content, so that a power failure does not leave a renamed file that is empty."""
    with file.open("rb+") as content:
        os.fsync(content.fileno())
