"""What a saved adapter holds, as its config describes it; and the comparison with what a file really holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pgn_peft.checksums import of_tensors
from pgn_peft.generator import PromptGenerator
from pgn_peft.library import PatchLibrary, TokenLibrary
from pgn_peft.tensors import compare_tensors

if TYPE_CHECKING:
    from pgn_peft.config import PGNConfig

# Far beyond what is used, and as much as a gigabyte: no file can ask for more.
LARGEST_ADAPTER = 2**28


def make_library(
    config: PGNConfig, hidden_size: int, num_channels: int, directions: Tensor | None = None
) -> TokenLibrary | PatchLibrary:
    """Create the library that a config describes; for the "static" generator it is the prompts themselves."""
    size = config.num_virtual_tokens if config.generator == "static" else config.library_size
    if config.prompt_space == "pixel":
        return PatchLibrary(
            size,
            num_channels,
            config.patch_size,
            hidden_size,
            initializer_range=config.initializer_range,
            directions=directions,
            image_offset=config.image_offset,
        )
    slots = config.num_virtual_tokens if config.slot_prompts else None
    return TokenLibrary(
        size,
        hidden_size,
        initializer_range=config.initializer_range,
        num_slots=slots,
        depth=config.prompt_depth or 1,
    )


def make_generator(config: PGNConfig, num_channels: int) -> PromptGenerator | None:
    """Create the generator that a config describes; None for "static"."""
    if config.generator == "static":
        return None
    return PromptGenerator(
        config.num_virtual_tokens,
        config.library_size,
        trunk=config.generator,
        num_channels=num_channels,
        image_size=config.generator_image_size,
        width=config.generator_width,
        norm=config.generator_norm,
        mixing=config.mixing,
        initial_logit_std=config.initial_logit_std,
        rank=config.generator_rank,
    )


def check_size(config: PGNConfig) -> None:
    """Refuse an adapter that cannot be meant, before memory is taken for it.

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
    """Return the folder with an adapter's weights: the local one, or the Hub's in the cache, after a download.

    Args:
        name_or_path: a local folder, or the id of a repository on the Hub.
        subfolder: where in it the adapter lies.
        download_kwargs: for `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: the repository has no safetensors file.
    """
    folder = Path(name_or_path, subfolder or "")
    if folder.joinpath(CONFIG_NAME).is_file():
        return folder
    try:
        file = hf_hub_download(name_or_path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download_kwargs)
    except EntryNotFoundError as error:
        raise ValueError(
            f"`{name_or_path}` must hold the adapter's weights as {SAFETENSORS_WEIGHTS_NAME}, but got none: {error}. "
            f"Pickled weights ({WEIGHTS_NAME}) are not read; save the adapter with safe_serialization=True."
        ) from error
    return Path(file).parent


def check_saved_weights(folder: Path, config: PGNConfig) -> None:
    """Check the weights in an adapter's folder against its config, before a model is touched or memory is taken.

    Args:
        folder: an adapter's folder.
        config: its configuration, with the recorded `hidden_size` and `num_channels`.

    Raises:
        ValueError: the weights are not there, cannot be read, or are not what the config describes.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        pickled = folder.joinpath(WEIGHTS_NAME).is_file()
        raise ValueError(
            f"`{folder}` must hold the adapter's weights, but got no {SAFETENSORS_WEIGHTS_NAME} there"
            + (
                f", only a pickled {WEIGHTS_NAME}, which is not read. Save the adapter with safe_serialization=True."
                if pickled
                else ". Copy or download the adapter again."
            )
        )
    expected = describe_weights(config)
    try:
        with safe_open(file, "pt") as archive:
            # Only the header, so that no file can take more memory than its config has been allowed.
            header = {name: _empty(archive.get_slice(name)) for name in archive.keys()}  # noqa: SIM118
        _compare(expected, header, config, str(file))
        _compare(expected, load_file(file), config, str(file))
    except SafetensorError as error:
        raise ValueError(
            f"`{file}` must be a complete safetensors file, but reading it failed: {error}. Copy or download the "
            "adapter again."
        ) from error


def checksums_of_parts(file: Path) -> dict[str, str]:
    """Return checksums of generator, library and head in an adapter's file, by the names of their containers."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        part, _, own_name = _own_name(name).partition(".")
        if own_name:
            parts.setdefault(part, {})[own_name] = tensor
    return {part: of_tensors(tensors) for part, tensors in parts.items() if part.startswith("pgn_")}


def describe_weights(config: PGNConfig) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name, on the meta device: all of them but those of `modules_to_save`.

    Args:
        config: the adapter's, with the recorded `hidden_size` and `num_channels`.
    """
    num_channels = config.num_channels or 3
    with torch.device("meta"):
        modules: dict[str, nn.Module | None] = {
            "library": make_library(config, config.hidden_size, num_channels),
            "generator": make_generator(config, num_channels),
        }
        if config.head == "trained" and config.num_labels is not None:
            modules["head"] = nn.Linear(config.head_features or config.hidden_size, config.num_labels)
    return {
        f"pgn_{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def _empty(tensor: Any) -> Tensor:
    """Stand in for a tensor of a file that has not been read."""
    dtype = torch.float32 if tensor.get_dtype().startswith(("F", "BF")) else torch.int64
    return torch.empty(tensor.get_shape(), dtype=dtype, device="meta")


def _own_name(name: str) -> str:
    """Return a tensor's name within the adapter, "pgn_head.weight", wherever in the model that lies."""
    return "pgn_" + name.partition(".pgn_")[2] if ".pgn_" in name else name


def _compare(expected: dict[str, Tensor], tensors: dict[str, Tensor], config: PGNConfig, source: str) -> None:
    wanted = {module: [name for name in tensors if f"{module}." in name] for module in config.modules_to_save or ()}
    allowed = {name for names in wanted.values() for name in names}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Where in the model a part lies is PEFT's business; here it is enough that each is there once.
        own = _own_name(name)
        if own != name or name not in allowed:
            # PEFT would load a tensor that is none of the adapter's over the frozen base's own.
            found[name if own in found else own] = tensor
    compare_tensors(expected, found, source)
    for module, names in wanted.items():
        if not names:
            raise ValueError(
                f"`modules_to_save` must name modules that were saved, but got {module!r}, of which {source} has no "
                "tensor. Fetch the adapter again."
            )
