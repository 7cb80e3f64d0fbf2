"""The workers of the loader of `train_image_classifier.py`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

# What more would do for a frozen backbone is not worth their memory: each holds two batches, and torch.
MOST_WORKERS = 8
# macOS and Windows start each worker from nothing: seconds, and the imports' memory once more.
MOST_SPAWNED_WORKERS = 4


@dataclass
class LoaderArguments(TrainingArguments):
    """`TrainingArguments` whose loader suits the machine, unless told otherwise."""

    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "By default one for each core but one, 8 at most, with an accelerator; 0 on a CPU."},
    )
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep the workers between epochs; by default wherever there are some."}
    )

    def __post_init__(self) -> None:
        accelerated = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers(accelerated)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and accelerated
        super().__post_init__()


def default_workers(accelerated: bool) -> int:
    """Return how many workers a process's loader gets.

    None on a CPU: there a step takes several times as long as its images, on the cores that workers would need.
    """
    if not accelerated:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = MOST_WORKERS if sys.platform == "linux" else MOST_SPAWNED_WORKERS
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, most))
