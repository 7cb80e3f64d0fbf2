"""Limits for visitors of a public Space: repositories on the Hub only, with models and images of bounded size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from uploads import ADAPTER_FILES, LARGEST_SIDE, MOST_UNPACKED

from pgn_peft.hub.publishing import is_repo_id

ON_A_SPACE = "SPACE_ID" in os.environ
# Visitors must not use the token of the Space's owner; on your own machine your token is used.
TOKEN = False if ON_A_SPACE else None
LARGEST_MODEL = 2 * 2**30  # bytes
MOST_PROMPTS = 1024


def is_id(name: str) -> bool:
    """Whether a name has the form owner/name, and is not a local folder."""
    return "/" in name and is_repo_id(name)


def check_model(name: str) -> None:
    """Raise a ValueError unless a model is on the Hub and not too large."""
    _check_size(name, ("model.safetensors", "model-"), LARGEST_MODEL)


def fetch_adapter(name: str) -> Path:
    """Download the files of an adapter on the Hub, if they are not too large, and return their folder."""
    revision = _check_size(name, ADAPTER_FILES, MOST_UNPACKED)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(ADAPTER_FILES), token=TOKEN))


def _check_size(name: str, files: tuple[str, ...], most: int) -> str | None:
    if not is_id(name):
        raise ValueError(f"{name!r} is not the id of a repository on the Hub. Write owner/name.")
    try:
        info = HfApi().model_info(name, files_metadata=True, token=TOKEN)
    except HfHubHTTPError as error:
        raise ValueError(f"There is no public {name!r} on the Hub. Look for a misspelt name.") from error
    size = sum(file.size or 0 for file in info.siblings or () if file.rfilename.startswith(files))
    if not 0 < size <= most:
        raise ValueError(
            f"{name!r} has {size / 2**20:.0f} MB of the files {', '.join(files)}; up to {most / 2**20:.0f} MB are "
            "possible here."
        )
    return info.sha


def check_adapter(folder: Path) -> str:
    """Check the sizes in an adapter's settings, and return the name of its base.

    Raises:
        ValueError: the sizes are too large, or the adapter does not name its base.
    """
    config = _read_settings(folder / "adapter_config.json")
    prompts = config.get("num_virtual_tokens")
    if isinstance(prompts, int) and prompts > MOST_PROMPTS:
        raise ValueError(f"The adapter has {prompts} prompts; at most {MOST_PROMPTS} are possible here.")
    for file in folder.glob("*processor_config.json"):
        if (largest := _largest(_read_settings(file))) > LARGEST_SIDE:
            raise ValueError(f"The images are {largest} pixels large; at most {LARGEST_SIDE} are possible here.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError("The adapter does not name its base model (`base_model_name_or_path`).")
    return base


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} does not hold settings in JSON. Save the adapter again.")
    return settings


def _largest(settings: dict[str, Any], prefix: str = "") -> int:
    """Return the largest image size in a processor's settings."""
    found = [0]
    for name, value in settings.items():
        if isinstance(value, dict):
            found.append(_largest(value, prefix + name))
        elif isinstance(value, int) and any(word in prefix + name for word in ("size", "pad")):
            found.append(value)
    return max(found)
