"""What visitors of a public Space may load: repositories on the Hub, and models and images of bounded size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from uploads import ADAPTER_FILES, LARGEST_SIDE, MOST_UNPACKED

ON_A_SPACE = "SPACE_ID" in os.environ
# Visitors must not load or publish by the token of the Space's owner; on your own machine it is yours.
TOKEN = False if ON_A_SPACE else None
LARGEST_MODEL = 2 * 2**30  # bytes
MOST_PROMPTS = 1024


def is_id(name: str) -> bool:
    """Whether a name is like owner/name, and no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def check_model(name: str) -> None:
    """Check that a model is one on the Hub, and not too large.

    Raises:
        ValueError: it is not.
    """
    _sizes("model", name, ("model.safetensors", "model-"), LARGEST_MODEL, refused="adapter_config.json")


def fetch_adapter(name: str) -> Path:
    """Fetch the files of an adapter on the Hub, and return their folder.

    Raises:
        ValueError: there is no such adapter, or it is too large.
    """
    revision = _sizes("adapter", name, ADAPTER_FILES, MOST_UNPACKED)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(ADAPTER_FILES), token=TOKEN))


def _sizes(what: str, name: str, files: tuple[str, ...], most: int, refused: str | None = None) -> str | None:
    if not is_id(name):
        raise ValueError(f"`{what}` must be the id of one on the Hub, but got {name!r}. Write owner/name.")
    try:
        info = HfApi().model_info(name, files_metadata=True, token=TOKEN)
    except HfHubHTTPError as error:
        raise ValueError(
            f"`{what}` must be the id of a public one on the Hub, but got {name!r}, which is not there. Look for a "
            "misspelt name."
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if refused in sizes:
        raise ValueError(f"`{what}` must be a model, but got {name!r}, an adapter. Name the model that it is for.")
    size = sum(size for file, size in sizes.items() if file.startswith(files))
    if not 0 < size <= most:
        raise ValueError(
            f"`{what}` must be at most {most / 2**20:.0f} MB of safetensors, but got {size / 2**20:.0f} MB for "
            f"{name!r}. Name a smaller one."
        )
    return info.sha


def check_adapter(folder: Path) -> str:
    """Check the sizes that an adapter's files ask for, and return the name of its base.

    Raises:
        ValueError: they are too large, or the adapter does not name its base.
    """
    config = _read_settings(folder / "adapter_config.json")
    prompts = config.get("num_virtual_tokens")
    if isinstance(prompts, int) and prompts > MOST_PROMPTS:
        raise ValueError(f"`num_virtual_tokens` must be at most {MOST_PROMPTS} here, but got {prompts}. Use fewer.")
    for file in folder.glob("*processor_config.json"):
        if (largest := _largest(_read_settings(file))) > LARGEST_SIDE:
            raise ValueError(
                f"`size` must be at most {LARGEST_SIDE} pixels here, but got {largest}. Use smaller images."
            )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`base_model_name_or_path` must be the id of a model, but got {base!r}. Name it in the adapter."
        )
    return base


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, nested too deeply
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"`{file.name}` must hold settings in JSON, but got something else. Save the adapter again.")
    return settings


def _largest(settings: dict[str, Any]) -> int:
    """Return the largest side of images that a processor's settings name."""
    found = [0]
    for name, value in settings.items():
        if isinstance(value, dict):
            found.append(_largest({name + key: inner for key, inner in value.items()}))
        elif isinstance(value, int) and ("size" in name or "pad" in name):
            found.append(value)
    return max(found)
