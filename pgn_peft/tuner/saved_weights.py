"""The tensors of a saved adapter as its config describes them, and their comparison with a file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pgn_peft.tuner.backbones import HEAD, SUPPORTED
from pgn_peft.tuner.build import make_generator, make_head, make_library
from pgn_peft.tuner.fields import PGNFields
from pgn_peft.utils.checksums import of_tensors
from pgn_peft.utils.sources import find_folder
from pgn_peft.utils.tensors import compare_tensors
from pgn_peft.utils.values import filled

# What PEFT puts before the names of tensors in a file; and torch.compile's part of a name, which no file may have.
PREFIX = "base_model.model."
WRAPPED = "_orig_mod."
# What PEFT passes on of its callers' options.
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# An upper limit of a gigabyte, far beyond what is used.
LARGEST_ADAPTER = 2**28


def check_size(config: PGNFields) -> None:
    """Refuse an adapter that is too large, before memory is allocated for it.

    Args:
        config: the adapter's, with the recorded `hidden_size` and `num_channels`.

    Raises:
        ValueError: its tensors hold more than `LARGEST_ADAPTER` numbers.
    """
    tensors = describe_weights(config)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if numbers > LARGEST_ADAPTER:
        largest = max(tensors, key=lambda name: tensors[name].numel())
        raise ValueError(
            f"`num_virtual_tokens`, `library_size`, `prompt_depth`, `generator_width` and `num_labels` must describe "
            f"at most {LARGEST_ADAPTER:,} numbers, but got {numbers:,}, most of them in {largest} "
            f"{tuple(tensors[largest].shape)}. Make them smaller; an adapter has about a million."
        )


def find_weights(name_or_path: str, subfolder: str | None, download_kwargs: dict[str, Any]) -> Path:
    """Find the folder with an adapter's weights, which are downloaded where they lie on the Hub.

    Args:
        name_or_path: a local folder, or the id of a repository on the Hub.
        subfolder: where in it the adapter lies.
        download_kwargs: as for `huggingface_hub.hf_hub_download`.

    Raises:
        OSError: there is neither a folder nor a repository of that name.
    """
    file = SAFETENSORS_WEIGHTS_NAME if subfolder is None else f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}"
    options = {name: value for name, value in download_kwargs.items() if name in DOWNLOAD_OPTIONS}
    return find_folder("pretrained_model_name_or_path", name_or_path, [file], **options) / (subfolder or "")


def check_saved_weights(folder: Path, config: PGNFields) -> None:
    """Check the weights in an adapter's folder against its config, before a model is touched or memory is taken.

    Args:
        folder: an adapter's folder.
        config: its configuration, with the recorded `hidden_size` and `num_channels`.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
        ValueError: the weights cannot be read, or are not what the config describes.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"`{folder}` must hold the adapter's weights, but got no {SAFETENSORS_WEIGHTS_NAME} there. Copy or "
            f"download the adapter again. Pickled weights ({WEIGHTS_NAME}) are not read: save them with "
            "safe_serialization=True."
        )
    if config.target_modules is None:
        raise ValueError(
            f"`target_modules` must be recorded in a saved adapter, but got None in {str(folder)!r}. Copy or "
            "download the adapter again."
        )
    expected = describe_weights(config)
    try:
        with safe_open(file, "pt") as archive:
            # Only the header, so that a file cannot take more memory than its config describes.
            header = {name: _empty(archive.get_slice(name)) for name in archive.keys()}  # noqa: SIM118
        _compare(expected, header, config, str(file))
        _compare(expected, load_file(file), config, str(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"`{file}` must be a complete safetensors file, but reading it failed: {error}. Copy or download the "
            "adapter again."
        ) from error


def checksums_of_parts(file: Path) -> dict[str, str]:
    """Return checksums of generator, library and head in an adapter's file, by the names of their containers."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        part, _, own_name = name.rpartition(".pgn_")[2].partition(".")
        if ".pgn_" in name:
            parts.setdefault(f"pgn_{part}", {})[own_name] = tensor
    checksums = {part: of_tensors(tensors) for part, tensors in parts.items()}
    return {part: checksum for part, checksum in checksums.items() if checksum is not None}


def describe_weights(config: PGNFields) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name, on the meta device: all of them but those of `modules_to_save`.

    Args:
        config: the adapter's, with the recorded `hidden_size` and `num_channels`.
    """
    num_channels = config.num_channels or 3
    with torch.device("meta"):
        modules: dict[str, nn.Module | None] = {
            "library": make_library(config, filled(config.hidden_size), num_channels),
            "generator": make_generator(config, num_channels),
        }
        if config.head != "frozen" and config.num_labels is not None:
            modules["head"] = make_head(config)
    embeddings = f"{PREFIX}{filled(config.target_modules)[0]}"
    backbone = SUPPORTED.get((config.auto_mapping or {}).get("base_model_class", ""))
    head = HEAD if backbone is None or backbone.head is None else backbone.head
    places = {"library": embeddings, "generator": embeddings, "head": f"{PREFIX}{head}"}
    return {
        f"{places[part]}.pgn_{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def _empty(tensor: Any) -> Tensor:
    """Stand in for a tensor of a file that has not been read."""
    dtype = torch.float32 if tensor.get_dtype().startswith(("F", "BF")) else torch.int64
    return torch.empty(tensor.get_shape(), dtype=dtype, device="meta")


def _compare(expected: dict[str, Tensor], tensors: dict[str, Tensor], config: PGNFields, source: str) -> None:
    saved = [name for name in tensors if name.startswith(PREFIX) and WRAPPED not in name]
    wanted = {module: [name for name in saved if f"{module}." in name] for module in config.modules_to_save or ()}
    allowed = {name for names in wanted.values() for name in names}
    # PEFT would load any other tensor over the frozen base's own, or, with the name of a wrapper, not at all.
    compare_tensors(expected, {name: tensor for name, tensor in tensors.items() if name not in allowed}, source)
    for module, names in wanted.items():
        if not names:
            raise ValueError(
                f"`modules_to_save` must name modules that were saved, but got {module!r}, of which {source} has no "
                "tensor. Fetch the adapter again."
            )
