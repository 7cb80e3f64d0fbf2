"""The files of a prompter: prompter.safetensors, and prompter_config.json, which describes its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgn_peft.utils.files import replacing
from pgn_peft.utils.sources import find_folder
from pgn_peft.utils.tensors import compare_tensors

CONFIG_FILE = "prompter_config.json"
WEIGHTS_FILE = "prompter.safetensors"
COUNTER = ".num_batches_tracked"


def write_files(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, which is made.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replacing(folder) as staged:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / WEIGHTS_FILE)
        staged.joinpath(CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def find_files(name_or_path: str | Path, revision: str | None, token: str | None) -> Path:
    """Find the folder of a prompter, a local one or a download from the Hub.

    Raises:
        OSError: the folder or repository does not exist, or a file is missing.
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


def read_tensors(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors that the configuration declares, and convert them to the expected dtypes.

    Args:
        folder: the prompter's.
        expected: tensors of the same names and shapes, on any device.

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
    # BatchNorm counts training steps there. Tools convert and average it with the weights; nothing reads it.
    counters = {name: torch.zeros_like(expected[name], device="cpu") for name in expected if name.endswith(COUNTER)}
    tensors |= counters
    compare_tensors(expected, tensors, str(file))
    return {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
