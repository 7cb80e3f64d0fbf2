"""Training images that are read as they come (`--streaming true`): from parquet files, from folders, from the Hub.

The stream has no end, since `--max_steps` bounds training: processes whose shares differ in size never wait for each
other at an end, and `Trainer`, which skips what a resumed run has seen, never skips past one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset
from image_data import (
    DataArguments,
    check_classes,
    find_parquet,
    find_recipe,
    load_splits,
    name_columns,
    name_splits,
    read_parquet,
    read_source,
)
from image_folder import UprightImage, check_images
from image_transforms import Transform
from torch.utils.data import get_worker_info
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

# Pieces that a folder of images is cut into, for processes and workers to share.
FOLDER_SHARDS = 64
# Evaluations and checkpoints where --eval_steps and --save_steps are not given.
EVALUATIONS = 10


def prepare_streaming(data: DataArguments, arguments: TrainingArguments) -> None:
    """Check what a stream needs, and set what suits one; nothing without `--streaming true`.

    Raises:
        SystemExit: the length of training is not known, or an option needs images that lie still.
    """
    if not data.streaming:
        return
    if arguments.max_steps <= 0:
        raise SystemExit(
            f"`max_steps` must be given with --streaming true, since a stream has no epochs, but got "
            f"{arguments.max_steps}. Add --max_steps: images to train on, divided by those of a step."
        )
    if data.cache_images:
        raise SystemExit(
            "`cache_images` must be false with --streaming true, but got true. Cache the images where they fit on a "
            "disk, and stream them where they do not."
        )
    if data.max_train_samples is not None:
        raise SystemExit(
            f"`max_train_samples` must be left out with --streaming true, but got {data.max_train_samples}. "
            "--max_steps bounds what is read."
        )
    if data.shuffle_buffer < 1:
        raise SystemExit(f"`shuffle_buffer` must be 1 at least, but got {data.shuffle_buffer}. Take 1000.")
    every = max(1, arguments.max_steps // EVALUATIONS)
    if arguments.eval_strategy == IntervalStrategy.EPOCH:
        arguments.eval_strategy, arguments.eval_steps = IntervalStrategy.STEPS, every
    if arguments.save_strategy == IntervalStrategy.EPOCH:
        arguments.save_strategy, arguments.save_steps = IntervalStrategy.STEPS, every
    if arguments.accelerator_config.dispatch_batches is None:
        # Accelerate's own choice for a stream: the first process reads for all and sends them finished batches.
        arguments.accelerator_config.dispatch_batches = False


def load_images(data: DataArguments, seed: int, shuffle_seed: int = 0) -> DatasetDict | dict[str, Any]:
    """Load the splits as `load_splits` does; with `data.streaming` train is an endless stream of encoded images.

    Args:
        data: where the images are.
        seed: of the split, where the source has none.
        shuffle_seed: of the order of the stream.

    Raises:
        SystemExit: there are no validation images, or the classes have no names.
    """
    if not data.streaming:
        return load_splits(data, seed)
    recipe = find_recipe(data.dataset)
    if Path(recipe.dataset).is_dir() and not find_parquet(recipe.dataset):
        # Files are read as they come in any case. Their names lie class by class, so they are shuffled first.
        splits = dict(load_splits(data, seed))
        rows = splits["train"].cast_column("image", Image(decode=False)).shuffle(seed=shuffle_seed)
        stream = rows.to_iterable_dataset(min(FOLDER_SHARDS, len(rows)))
    else:
        stream, splits = _open(data, recipe)
    stream = stream.repeat(None).shuffle(seed=shuffle_seed, buffer_size=data.shuffle_buffer)
    return splits | {"train": stream}


def _open(data: DataArguments, recipe) -> tuple[IterableDataset, dict[str, Dataset]]:
    files = find_parquet(recipe.dataset)
    if files:
        splits = {name: read_parquet(names, streaming=name == "train") for name, names in files.items()}
    else:
        splits = dict(read_source(recipe.dataset, recipe.configuration, streaming=True))
    splits = name_splits(splits, data.dataset)
    if "validation" not in splits:
        raise SystemExit(
            f"`dataset` must have a split 'validation' with --streaming true, since nothing can be divided off a "
            f"stream, but got {data.dataset!r} with {', '.join(splits)}. Cut some images off into a split of that "
            "name, or leave --streaming out."
        )
    stream = name_columns(splits.pop("train"), data, recipe, decode=False)
    label = (stream.features or {}).get("label")
    if not isinstance(label, ClassLabel):
        raise SystemExit(
            f"`label_column` must have named classes (ClassLabel) with --streaming true, since they cannot be "
            f"collected beforehand, but got {label!r}. Save the data set after class_encode_column('label'), or leave "
            "--streaming out."
        )
    evaluated = {name: name_columns(rows, data, recipe, decode=False) for name, rows in splits.items()}
    for name, rows in evaluated.items():
        if isinstance(rows, IterableDataset):
            # Small beside the training images, and read again and again. The commit is part of the cache's name.
            rows = Dataset.from_generator(_rows, features=rows.features, gen_kwargs={"stream": rows})
        evaluated[name] = rows.cast_column("image", UprightImage())
    check_classes(evaluated, label.names)
    check_images(evaluated)
    return stream.reshard(), evaluated


def _rows(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream


@dataclass
class StreamCollator:
    """Decodes and augments encoded images, then makes a batch of them; other examples become a batch as they are.

    Here rather than in the stream, so that a process decodes nothing of what it leaves to the others. The n-th batch
    of a worker is augmented by random numbers of its own, so that a resumed run sees what an uninterrupted one would.

    Args:
        transform: encoded images to `pixel_values`.
        collate: examples to a batch.
        seed: of the augmentation.
        process: number of this process, of which each augments in its own way.
    """

    transform: Transform
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    seed: int
    process: int = 0

    def __post_init__(self) -> None:
        self.batches = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of examples with `image` and `label`, or with `pixel_values` and `labels`."""
        if "image" not in examples[0]:
            return self.collate(examples)
        worker = get_worker_info()
        place = (self.seed, self.process, 0 if worker is None else worker.id, self.batches)
        self.batches += 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash(place))  # of integers: the same in every process
            rows = self.transform({name: [example[name] for example in examples] for name in ("image", "label")})
        pairs = zip(rows["pixel_values"], rows["labels"], strict=True)
        return self.collate([{"pixel_values": pixels, "labels": label} for pixels, label in pairs])


def first_images(stream: IterableDataset, count: int) -> Dataset:
    """Read the first images of a stream, still encoded."""
    return Dataset.from_list(list(stream.take(count)), features=stream.features)
