"""Training in several processes: what they must agree on beside the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pgn_peft.nn.generator import BatchNorm2d, PromptGenerator
from pgn_peft.tuner.layer import PGNTunerLayer


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        if isinstance(layer, PGNTunerLayer):
            for container in layer.adapter_layer_names:
                yield from getattr(layer, container).buffers()


def broadcast_statistics(model: nn.Module, source: int = 0) -> None:
    """Give all processes the BatchNorm statistics of one of them. Does nothing in a single process.

    DistributedDataParallel keeps weights equal and broadcasts buffers *before* each step; what the last step did to
    running means and variances stays different in each process.

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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Broadcast before an evaluation or a checkpoint in the middle of an epoch."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            broadcast_statistics(model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Broadcast before an evaluation or a checkpoint at the end of an epoch."""
        broadcast_statistics(model)


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
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the steps of an epoch with those that the checkpoint's epochs had.

        Raises:
            ValueError: they differ.
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


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """`BatchNorm2d` over the images of all processes.

    Where its weight is frozen it keeps `BatchNorm2d`'s promise: running statistics are used, and left alone.

    Differs from `BatchNorm2d` where a channel has a single value in this process, which is normalised together with
    the other processes' values: these wait for it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W), channel by channel."""
        if self.training and not self.weight.requires_grad:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


def convert_batch_norms(model: nn.Module) -> int:
    """Replace the batch norms of trainable generators by `SyncBatchNorm2d`, with the same parameters and buffers.

    Args:
        model: a model with PGN adapters. Frozen adapters, and the backbone, keep what they have.

    Returns:
        How many were replaced.
    """
    replaced = 0
    generators = [module for module in model.modules() if isinstance(module, PromptGenerator)]
    for parent in [module for generator in generators for module in generator.modules()]:
        for name, norm in parent.named_children():
            if isinstance(norm, BatchNorm2d) and norm.weight.requires_grad:
                synchronised = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                synchronised._parameters, synchronised._buffers = norm._parameters, norm._buffers
                setattr(parent, name, synchronised.train(norm.training))
                replaced += 1
    return replaced


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let the batch norms of trainable generators see the images of all processes: torch's SyncBatchNorm, on GPUs.

    Names and tensors stay, so the saved adapter is the same as without, and an optimizer that has the parameters keeps
    them. Call it after the model is on its GPU and before DistributedDataParallel wraps it.

    Args:
        model: a model with PGN adapters.

    Raises:
        ValueError: there is one process, the model is on a CPU, or no trainable generator has batch norms.
    """
    if not _several_processes():
        raise ValueError(
            "`sync_batch_norm` must be used with several processes, but got one, whose batch norms see all images. "
            "Leave it out, or start more with accelerate launch."
        )
    device = next(model.parameters()).device
    if device.type == "cpu":
        raise ValueError(
            f"`sync_batch_norm` must be used on GPUs, but got a model on {device}: torch has no other SyncBatchNorm. "
            "Use generator_norm='group', which needs no statistics, or EqualStatistics, which keeps them equal."
        )
    if convert_batch_norms(model) == 0:
        raise ValueError(
            "`sync_batch_norm` must be used with generator_norm='batch', but got a model whose trainable adapters "
            "have no batch norms. Leave it out."
        )


def check_processes_meet(args: TrainingArguments) -> None:
    """Refuse processes that were started together and each believe themselves alone.

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
