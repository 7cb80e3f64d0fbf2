"""What training PGN adapters with `Trainer` needs beside `Trainer` itself."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pgn_peft.config import PGNConfig
from pgn_peft.layer import PGNLayer
from pgn_peft.processes import EqualStatistics, SameSteps, broadcast_statistics, synchronise_batch_norm

__all__ = [
    "EqualStatistics",
    "SameSteps",
    "broadcast_statistics",
    "last_complete_checkpoint",
    "parameter_groups",
    "start_library_from_images",
    "synchronise_batch_norm",
]

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    library_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for a torch optimizer.

    Args:
        model: a model with PGN adapters.
        learning_rate: of the generator, and of whatever `modules_to_save` names.
        library_learning_rate: of the token library (or static prompts); None: `learning_rate`.
        head_learning_rate: of the classification head; None: `learning_rate`.
        weight_decay: of matrices and convolutions. Norms and biases are not decayed.

    Returns:
        Groups with the keys `name`, `params`, `lr` and `weight_decay`; each parameter is in exactly one.

    Raises:
        ValueError: nothing is trainable.
    """
    rates = {
        "pgn_generator": learning_rate,
        "pgn_library": learning_rate if library_learning_rate is None else library_learning_rate,
        "pgn_head": learning_rate if head_learning_rate is None else head_learning_rate,
        "other": learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in rates if f".{part}." in f".{name}"), "other")
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(
            "`model` must have trainable parameters, but got a frozen one. Load the adapter with is_trainable=True, "
            "or activate it: model.set_adapter(name)."
        )
    return [
        {"name": part, "params": parameters, "lr": rates[part], "weight_decay": weight_decay if decayed else 0.0}
        for (part, decayed), parameters in groups.items()
    ]


def last_complete_checkpoint(output_dir: str | Path, world_size: int = 1) -> Path | None:
    """Find the newest checkpoint that a run can go on from.

    Trainer does not write checkpoints atomically: a crash can leave one with files missing or cut short. Every file
    that resuming reads is read here; a checkpoint that fails is passed over with a warning.

    One that another number of processes has saved will do: weights, optimizer and schedule are the same for all. Only
    the random numbers start anew, which is warned of.

    Args:
        output_dir: folder with Trainer's `checkpoint-<step>` folders.
        world_size: number of processes that are to go on; each saves the state of its random numbers.

    Returns:
        The folder, or None if there is no complete one.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            processes = _read_checkpoint(path, world_size)
        except (OSError, ValueError, BadZipFile, SafetensorError) as error:
            logger.warning("Passing over %s, which a crash seems to have left incomplete: %s", path, error)
        else:
            if processes != world_size:
                logger.warning(
                    "%s was saved by %d process(es), not %d: random numbers start anew.", path, processes, world_size
                )
            return path
    return None


def _read_checkpoint(path: Path, world_size: int) -> int:
    """Read all files, and return the number of processes whose random numbers are there."""
    json.loads((path / "trainer_state.json").read_text())
    weights = list(path.rglob(SAFETENSORS_WEIGHTS_NAME))  # an adapter with a name lies in a folder of that name
    if not weights:
        raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME}")
    for file in weights:
        load_file(file)
        if file.with_name(CONFIG_NAME).is_file():
            PGNConfig.from_pretrained(str(file.parent))  # compares both with their checksums
    random_states = _random_states(path, world_size)
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        # torch.save writes zip archives. Their checksums are enough here, and nothing is unpickled.
        with ZipFile(path / name) as archive:
            if (damaged := archive.testzip()) is not None:
                raise BadZipFile(f"{name} is damaged at {damaged}")
    return len(random_states)


def _random_states(path: Path, world_size: int) -> list[str]:
    """Return the names of the files with random states: this number of processes' if all are there."""
    of_one, of_each = "rng_state.pth", "rng_state_{}.pth"
    wanted = [of_one] if world_size == 1 else [of_each.format(rank) for rank in range(world_size)]
    if all((path / name).is_file() for name in wanted):
        return wanted
    if world_size > 1 and (path / of_one).is_file():
        return [of_one]
    ranks = len(list(path.glob(of_each.format("*"))))
    # A single one of several, or one with a gap before it, is what a crash leaves behind. (A crash that loses the last
    # of three or more looks like a run of fewer processes; weights, optimizer and schedule are whole in both.)
    if ranks > 1 and all((path / of_each.format(rank)).is_file() for rank in range(ranks)):
        return [of_each.format(rank) for rank in range(ranks)]
    raise FileNotFoundError(f"no {' or '.join(wanted)}, nor those of another number of processes")


@torch.no_grad()
def start_library_from_images(model: nn.Module, images: Tensor, adapter_name: str = "default", seed: int = 0) -> None:
    """Start the library of an adapter in pixel space from patches of training images, before it is trained.

    Args:
        model: a model with the adapter.
        images: (B, C, H, W) in [0, 1], a few hundred, at least as large as a patch.
        adapter_name: the adapter.
        seed: of the choice of places.

    Raises:
        ValueError: there is no such adapter in pixel space, or the images are no such images.
    """
    libraries = [
        layer.pgn_library[adapter_name]
        for layer in model.modules()
        if isinstance(layer, PGNLayer) and adapter_name in layer.layouts
    ]
    if not libraries:
        raise ValueError(
            f"`adapter_name` must be an adapter in pixel space, but got {adapter_name!r}. Make it with "
            "PGNConfig(prompt_space='pixel', ...)."
        )
    channels, side = libraries[0].patch_logits.shape[1:3]
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise ValueError(
            f"`images` must have the axes (B, {channels}, H, W) and measure {side} pixels at least, but got "
            f"{tuple(images.shape)}. Stack images of one size."
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"`images` must lie in [0, 1], but got {images.min().item():g} to {images.max().item():g}. Give them "
            "before they are normalised, or undo it: `pgn_peft.preprocessing.denormalize`."
        )
    libraries[0].start_from_images(images, torch.Generator().manual_seed(seed))
