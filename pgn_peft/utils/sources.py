"""Finds the local folder or the repository on the Hub that a name means, and downloads its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def find_folder(
    field: str,
    name_or_path: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Find a folder: a local one, or one commit of a Hub repository, of which only the named files are downloaded.

    Args:
        field: what to call `name_or_path` in an error.
        name_or_path: a folder, or the id of a repository.
        files: patterns of the names of the files to download.
        revision: branch, tag or commit of the repository.
        token: for private repositories; None: the token of `hf auth login`.
        cache_dir: where downloads are kept; None: the Hub's cache.
        local_files_only: look into the cache only.
        force_download: download files again that are in the cache.

    Raises:
        OSError: there is neither a folder nor a repository of that name, the Hub refused or could not be reached, or
            `huggingface_hub` is not installed.
    """
    try:
        if Path(name_or_path).is_dir():
            return Path(name_or_path)
    except OSError:
        pass  # too long to be the name of a folder
    problem = f"`{field}`: {str(name_or_path)!r} is not a folder"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise OSError(f"{problem}. To look for it on the Hub, run: pip install huggingface_hub") from error
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                allow_patterns=list(files),
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise OSError(
            f"{problem}, and cannot be read from the Hub{at}: {one_line(error)} Check the name. A private repository "
            "needs a token (`hf auth login`); offline, what was fetched before is found in the cache."
        ) from error


def is_repo_id(name: Any) -> bool:
    """Whether `name` can be the id of a repository on the Hub, and is not a folder or file of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in a list

    if not isinstance(name, str) or not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """Return an error's message as one sentence."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if line.endswith((".", "!")) else line + "."
