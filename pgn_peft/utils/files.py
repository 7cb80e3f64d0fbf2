"""Saving that can be interrupted: new files take the place of old ones all together, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

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
    """Read a JSON object from an untrusted file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file does not hold a JSON object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"it holds a {type(settings).__name__}")
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # not UTF-8, no JSON, an endless number, nested too deeply
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
