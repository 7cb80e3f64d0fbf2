"""Training in several processes: equal BatchNorm statistics, and checks of launched and resumed runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pgn_peft.tuner.tuner_layer import PGNTunerLayer


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        if isinstance(layer, PGNTunerLayer):
            for container in layer.adapter_layer_names:
                yield from getattr(layer, container).buffers()


def broadcast_statistics(model: nn.Module, source: int = 0) -> None:
    """Give all processes the BatchNorm statistics of one of them. Does nothing in a single process.

    DistributedDataParallel keeps weights equal and broadcasts buffers *before* each step. Running means and variances
    therefore differ between processes after the last step.

    Args:
        model: the model, wrapped or not.
        source: rank whose statistics are kept.
    """
    if _several_processes():
        for buffer in _buffers(model):
            distributed.broadcast(buffer, src=source)


class EqualStatistics(TrainerCallback):
    """Keep BatchNorm's running statistics equal in all processes whenever they are evaluated or saved."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Broadcast before an evaluation or a checkpoint in the middle of an epoch."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            broadcast_statistics(kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Broadcast before an evaluation or a checkpoint at the end of an epoch."""
        broadcast_statistics(kwargs["model"])


class SameSteps(TrainerCallback):
    """Stop a resumed run whose optimizer steps see another number of images than before.

    `Trainer` counts a checkpoint's epochs by its steps. After a resumption on another number of processes it would
    otherwise repeat or leave out epochs, at learning rates of another place in the schedule.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare the steps of an epoch with those that the checkpoint's epochs had.

        Raises:
            ValueError: an epoch has another number of steps than before the interruption.
        """
        if not (state.global_step and state.epoch):
            return
        try:
            batches = len(train_dataloader)  # of each process
        except TypeError:  # a stream
            return
        steps = math.ceil(batches / args.gradient_accumulation_steps)
        if abs(state.epoch * steps - state.global_step) >= 1:
            raise ValueError(
                "`gradient_accumulation_steps` must leave an epoch the steps that it had before the interruption, "
                f"about {state.global_step / state.epoch:.0f}, but got {args.gradient_accumulation_steps}, with which "
                f"it has {steps} in {args.world_size} process(es). Keep processes x per_device_train_batch_size x "
                "gradient_accumulation_steps as it was."
            )


def check_processes_meet(args: TrainingArguments) -> None:
    """Refuse processes that were launched together but have not joined one group.

    Raises:
        ValueError: the launcher started several, and this one has joined no group.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"`use_cpu` must be given where there is no GPU, but got {args.use_cpu} in {started} processes that would "
            "each train alone and overwrite each other's files. Add --use_cpu to the script's arguments, or set "
            "ACCELERATE_USE_CPU=true."
        )
