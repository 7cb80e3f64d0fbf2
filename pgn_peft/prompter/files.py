"""The files of a prompter: prompter.safetensors, and prompter_config.json, which says what must be in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgn_peft.utils.sources import find_folder
from pgn_peft.utils.tensors import compare_tensors

CONFIG_FILE = "prompter_config.json"
WEIGHTS_FILE = "prompter.safetensors"


def write_files(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    folder.joinpath(CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def find_files(name_or_path: str | Path, revision: str | None, token: str | None) -> Path:
    """Find the folder of a prompter, a local one or a download from the Hub.

    Raises:
        OSError: there is none, or a file is missing.
    """
    files = (CONFIG_FILE, WEIGHTS_FILE)
    folder = find_folder("pretrained_model_name_or_path", name_or_path, files, revision=revision, token=token)
    for name in files:
        if not folder.joinpath(name).is_file():
            raise OSError(
                f"`{name_or_path}` must be a prompter, but got a folder without {name}. Save it there with "
                "save_pretrained; make_prompter makes a prompter of an adapter."
            )
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the configuration, which is not trusted.

    Raises:
        ValueError: the file is not a JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`{file}` must be JSON, but got {error}. Save or fetch the prompter again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{file}` must be a JSON object, but got {settings!r}. Save or fetch the prompter again.")
    return settings


def read_tensors(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors that the configuration declares.

    Args:
        folder: the prompter's.
        expected: tensors of the same names, shapes and dtypes, on any device.

    Raises:
        ValueError: the file is damaged, or holds other tensors.
    """
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"`{file}` must be a complete safetensors file, but got: {error}. Save or fetch the prompter again."
        ) from error
    compare_tensors(expected, tensors, str(file))
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"`{file}` must hold {name} as {expected[name].dtype}, but got {tensor.dtype}. Save or fetch the "
                "prompter again."
            )
    return tensors
