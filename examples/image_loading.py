"""From the splits of `train_image_classifier.py` to what its `Trainer` reads: workers, transforms, collator."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from image_data import DataArguments
from image_device import DeviceAugmentation
from image_stream import StreamCollator, first_images
from image_transforms import Transform, add_transforms, cache_images
from transformers import Trainer, TrainingArguments

# What more would do for a frozen backbone is not worth their memory: each holds two batches, and torch.
MOST_WORKERS = 8
# macOS and Windows start each worker from nothing: seconds, and the imports' memory once more.
MOST_SPAWNED_WORKERS = 4
# Images of a stream that its place is taken by where some must be looked at before training.
FIRST_IMAGES = 2000


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


@dataclass
class Images:
    """The splits, ready for training.

    Args:
        splits: train, validation and, where there are some, test.
        plain: rows to `pixel_values` without augmentation.
        data: the arguments they were made by.
        processor: image processor of the model.
    """

    splits: dict[str, Any]
    plain: Transform
    data: DataArguments
    processor: Any

    def as_they_are(self) -> Dataset:
        """Return the training images without augmentation; of a stream the first."""
        train = self.splits["train"]
        rows = first_images(train, FIRST_IMAGES) if self.data.streaming else train
        return rows.with_transform(self.plain)

    def attach(self, trainer: Trainer) -> None:
        """Let a trainer decode what is streamed, and augment on the device where that is asked for."""
        arguments, on_device = trainer.args, self.data.augment_on == "device"
        if self.data.streaming:
            transform = Transform(self.processor, "none" if on_device else self.data.augmentation)
            place = (arguments.seed, arguments.process_index)
            trainer.data_collator = StreamCollator(transform, trainer.data_collator, *place)
        if on_device:
            scale = (list(self.processor.image_mean), list(self.processor.image_std))
            DeviceAugmentation(self.data.augmentation, *scale).attach(trainer.model)

    def count(self, arguments: TrainingArguments) -> int:
        """Return the number of training images; of a stream how many are drawn, some maybe more than once."""
        if not self.data.streaming:
            return len(self.splits["train"])
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return arguments.max_steps * step


def prepare_images(splits: dict[str, Any], processor: Any, data: DataArguments, workers: int) -> Images:
    """Cache the images if asked to, and let the splits make `pixel_values` as they are read.

    Args:
        splits: as `load_images` returns them.
        processor: image processor of the model.
        data: what to do with them.
        workers: processes that the images of a cache may be resized in.

    Raises:
        SystemExit: the images of this processor cannot be cached.
    """
    if data.cache_images:
        splits = cache_images(splits, processor, workers)
    augmentation = "none" if data.augment_on == "device" else data.augmentation
    return Images(splits, add_transforms(splits, processor, augmentation), data, processor)
