"""What a saved adapter holds, as its config describes it; and the comparison with what a file really holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pgn_peft.generator import PromptGenerator
from pgn_peft.library import PatchLibrary, TokenLibrary
from pgn_peft.tensors import compare_tensors

if TYPE_CHECKING:
    from pgn_peft.config import PGNConfig


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
    return TokenLibrary(size, hidden_size, initializer_range=config.initializer_range, num_slots=slots)


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
        if folder.joinpath(WEIGHTS_NAME).is_file():
            return
        raise ValueError(
            f"`{folder}` must hold the adapter's weights, but got no {SAFETENSORS_WEIGHTS_NAME} there. Copy or "
            "download the adapter again."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"`{file}` must be a complete safetensors file, but reading it failed: {error}. Copy or download the "
            "adapter again."
        ) from error
    with torch.device("meta"):
        modules: dict[str, nn.Module | None] = {
            "library": make_library(config, config.hidden_size, config.num_channels or 3),
            "generator": make_generator(config, config.num_channels or 3),
        }
        if config.head == "trained" and config.num_labels is not None:
            modules["head"] = nn.Linear(config.hidden_size, config.num_labels)
    expected = {
        f"pgn_{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }
    # Where in the model a part lies is PEFT's business; here it is enough that each is there once.
    own = {"pgn_" + name.partition(".pgn_")[2]: tensor for name, tensor in tensors.items() if ".pgn_" in name}
    compare_tensors(expected, own, str(file))
    for wanted in config.modules_to_save or ():
        if not any(f"{wanted}." in name for name in tensors):
            raise ValueError(
                f"`modules_to_save` must name modules that were saved, but got {wanted!r}, of which {file} has no "
                "tensor. Fetch the adapter again."
            )
