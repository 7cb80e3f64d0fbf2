"""Checkpoints of interrupted runs."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pgn_peft.tuner.config import PGNConfig

logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | Path, world_size: int = 1) -> Path | None:
    """Find the newest checkpoint that a run can resume from.

    Trainer does not write checkpoints atomically: a crash can leave one with files missing or cut short. Every file
    that resuming reads is read here; a checkpoint that fails is skipped with a warning. So is one that was saved
    with `save_only_model=True`, from which Trainer would resume with a new optimizer and a new schedule.

    A checkpoint of another number of processes is accepted: weights, optimizer and schedule are the same for all. Only
    the random numbers start anew, with a warning.

    Args:
        output_dir: folder with Trainer's `checkpoint-<step>` folders.
        world_size: number of processes that resume; each saves the state of its random numbers.

    Returns:
        The folder, or None if there is no complete one.

    Raises:
        ValueError: no checkpoint is complete, and one was saved with `save_only_model=True`.
    """
    model_only: Path | None = None
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            processes = _read_checkpoint(path, world_size)
        except (OSError, ValueError, BadZipFile, SafetensorError) as error:
            if _holds_the_model_only(path):
                model_only = model_only or path
                logger.warning("Passing over %s, which was saved with save_only_model=True", path)
            else:
                logger.warning("Passing over %s, which a crash seems to have left incomplete: %s", path, error)
        else:
            if processes != world_size:
                logger.warning(
                    "%s was saved by %d process(es), not %d: random numbers start anew.", path, processes, world_size
                )
            return path
    if model_only is not None:
        raise ValueError(
            f"`output_dir` must hold a checkpoint with the optimizer's state to go on from, but got "
            f"{str(model_only)!r}, which was saved with save_only_model=True. Train anew in another folder, or start "
            "from its weights: PeftModel.from_pretrained(model, checkpoint, is_trainable=True)."
        )
    return None


def _read_checkpoint(path: Path, world_size: int) -> int:
    """Read all files, and return the number of processes whose random numbers are there."""
    json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
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


def _holds_the_model_only(path: Path) -> bool:
    """Whether a checkpoint is complete but for the state of the optimizer, the schedule and the random numbers."""
    complete = (path / "trainer_state.json").is_file() and any(path.rglob(SAFETENSORS_WEIGHTS_NAME))
    # Trainer writes trainer_state.json last.
    return complete and not any((path / name).exists() for name in ("optimizer.pt", "scheduler.pt"))


def _random_states(path: Path, world_size: int) -> list[str]:
    """Return the names of the files with random states: this number of processes' if all are there."""
    of_one, of_each = "rng_state.pth", "rng_state_{}.pth"
    wanted = [of_one] if world_size == 1 else [of_each.format(rank) for rank in range(world_size)]
    if all((path / name).is_file() for name in wanted):
        return wanted
    if world_size > 1 and (path / of_one).is_file():
        return [of_one]
    ranks = len(list(path.glob(of_each.format("*"))))
    # A single one of several, or one with a gap before it, is what a crash leaves. (A crash that loses the last
    # of three or more looks like a run of fewer processes; weights, optimizer and schedule are whole in both.)
    if ranks > 1 and all((path / of_each.format(rank)).is_file() for rank in range(ranks)):
        return [of_each.format(rank) for rank in range(ranks)]
    raise FileNotFoundError(f"no {' or '.join(wanted)}, nor those of another number of processes")
