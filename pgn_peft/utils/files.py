"""Files: finding a local folder or one on the Hub, replacing files atomically, checking the tensors in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def find_folder(name_or_path: str | Path, files: Sequence[str], **options: Any) -> Path:
    """Return a local folder, or download files of a Hub repository and return their folder.

    Args:
        name_or_path: a local folder, or the id of a repository.
        files: names or patterns of the files to download.
        **options: for `huggingface_hub.snapshot_download`.

    Raises:
        OSError: there is neither a folder nor a repository of that name, or the Hub could not be reached.
    """
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    problem = f"{str(name_or_path)!r} is not a folder"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise OSError(f"{problem}. To look for it on the Hub, run: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(files), **options))
    except (OSError, HFValidationError) as error:
        raise OSError(f"{problem}, and cannot be read from the Hub. {error}") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder. The files written into it then replace those of the same names in `folder`.

    `folder` is created if needed, and its other files are left alone. If writing fails, the old files are unchanged.
    Each file is replaced atomically, JSON files last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staged:
        yield Path(staged)
        for file in sorted(Path(staged).iterdir(), key=lambda file: file.suffix == ".json"):
            os.replace(file, folder / file.name)


def compare_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, remedy: str = "Fetch both again."
) -> None:
    """Compare names, shapes and values of tensors with the expected ones.

    Args:
        expected: tensors of the right names, shapes and kinds (floating-point or not).
        found: the tensors to load.
        source: where they come from, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or kind, or holds NaN or infinity.
    """
    problems = [f"{name} is not part of it" for name in sorted(found.keys() - expected.keys())]
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        wanted, tensor = expected[name], found[name]
        if tensor.shape != wanted.shape:
            problems.append(f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
        elif tensor.is_floating_point() != wanted.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype} instead of {wanted.dtype}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:5])
        raise ValueError(f"{source} is damaged, or does not belong to its configuration: {listed}. {remedy}")
