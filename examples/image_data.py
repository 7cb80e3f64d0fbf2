"""Images for `train_image_classifier.py`: where they come from, how they are augmented, how they become tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from huggingface_hub.errors import HFValidationError
from recipes import RECIPES, Recipe
from torchvision.transforms import v2
from transformers import AutoImageProcessor


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(
        metadata={"help": "Id of a data set, a folder of images or of parquet files, or a name in recipes.py."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column with the images; by default 'image'."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the classes; by default 'label'."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images only, the same share of each class."}
    )
    augmentation: str = field(
        default="official",
        metadata={
            "help": "flip, colour jitter, grayscale and solarize as in the official code; only 'flip'; or 'none'.",
            "choices": ["official", "flip", "none"],
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the images in pixels; None: the model's."})


def load_splits(arguments: DataArguments, seed: int) -> DatasetDict:
    """Load the images as splits train, validation and test, with the columns `image` and `label` (a `ClassLabel`).

    A source without validation images gives a tenth of its training images for it; one that has neither gives another
    tenth for test. One with validation images only is left without test.

    Raises:
        SystemExit: there are no training images, a column is missing, a class is too small to be split, or the splits
            have different classes.
    """
    recipe = Recipe(arguments.dataset, 0)
    if not Path(arguments.dataset).exists():
        recipe = RECIPES.get(arguments.dataset, recipe)
    splits = _read(recipe.dataset, recipe.configuration)
    for name in ("val", "valid", "dev"):
        if name in splits and "validation" not in splits:
            splits["validation"] = splits.pop(name)
    if "train" not in splits:
        raise SystemExit(
            f"`dataset` must have a split 'train', but got {arguments.dataset!r} with {', '.join(splits)}. Rename its "
            "training split."
        )
    columns = {
        arguments.image_column or recipe.image_column: "image",
        arguments.label_column or recipe.label_column: "label",
    }
    for column in columns:
        if column not in splits["train"].column_names:
            raise SystemExit(
                f"`image_column` and `label_column` must be columns of the data set, but got {column!r}. It has: "
                f"{', '.join(splits['train'].column_names)}. (A folder of images needs one subfolder a class, and no "
                "images beside these.)"
            )
    splits = splits.select_columns(list(columns))
    splits = splits.rename_columns({old: new for old, new in columns.items() if old != new})
    splits = splits.cast_column("image", Image(mode="RGB"))
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = splits.class_encode_column("label")
    _check_classes(splits)
    if "validation" not in splits:
        has_test = "test" in splits
        counts = Counter(splits["train"]["label"])
        splits["train"], rest = _divide(splits["train"], 0.1 if has_test else 0.2, seed, counts)
        splits["validation"], test = (rest, None) if has_test else _divide(rest, 0.5, seed, counts)
        if test is not None:
            splits["test"] = test
    wanted, available = arguments.max_train_samples, len(splits["train"])
    classes = splits["train"].features["label"].num_classes
    if wanted is not None and wanted < classes:
        raise SystemExit(f"`max_train_samples` must be at least {classes}, one a class, but got {wanted}. Use more.")
    if wanted is not None and available - wanted >= classes:
        splits["train"], _ = _divide(splits["train"], available - wanted, seed, Counter(splits["train"]["label"]))
    elif wanted is not None and wanted < available:
        splits["train"] = splits["train"].shuffle(seed=seed).select(range(wanted))  # too few to leave out by class
    return splits


def _read(source: str, configuration: str | None) -> DatasetDict:
    folder = Path(source)
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")) if folder.is_dir() else ():
        split = re.sub(r"-\d{5}-of-\d{5}.*", "", file.stem)  # as data sets are cut on the Hub
        files.setdefault(split, []).append(str(file))
    if files:
        # One by one: together, all splits would get the class names of the first, right or wrong.
        return DatasetDict(
            {split: load_dataset("parquet", data_files=names, split="train") for split, names in files.items()}
        )
    try:
        if folder.is_dir():
            return load_dataset("imagefolder", data_dir=source)
        return load_dataset(source, configuration)
    except (OSError, ValueError, HFValidationError) as error:
        raise SystemExit(
            f"`dataset` must be a folder of images or parquet files, or the id of a data set, but got {source!r}: "
            f"{error}. Look for a misspelt path."
        ) from error


def _divide(rows: Dataset, share: float | int, seed: int, counts: Counter) -> tuple[Dataset, Dataset]:
    """Split off a share (or number) of the rows, the same part of each class; `counts` is for the message."""
    try:
        cut = rows.train_test_split(test_size=share, stratify_by_column="label", seed=seed)
    except ValueError as error:
        names = rows.features["label"].names
        rare = ", ".join(f"{names[label]} ({count})" for label, count in counts.most_common()[:-4:-1])
        raise SystemExit(
            f"`dataset` must have enough images of each class to be split, but got these smallest classes: {rare}. "
            f"Add images, or bring splits of your own. ({error})"
        ) from error
    return cut["train"], cut["test"]


def _check_classes(splits: DatasetDict) -> None:
    names = splits["train"].features["label"].names
    for split, rows in splits.items():
        found = set(rows["label"])
        if None in found or -1 in found:
            raise SystemExit(f"`label` must be there for every image, but got none for some in {split!r}. Drop them.")
        if rows.features["label"].names != names or not found <= set(range(len(names))):
            raise SystemExit(
                f"`label` must have the same classes in all splits, but got other ones in {split!r}. Rebuild the "
                "splits from one data set."
            )


def load_processor(model_name_or_path: str, image_size: int | None, revision: str | None = None):
    """Load the model's image processor, set to another image size if asked for."""
    processor = AutoImageProcessor.from_pretrained(model_name_or_path, revision=revision)
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        processor.size = {"shortest_edge": image_size} if "shortest_edge" in processor.size else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square
    return processor


AUGMENTATIONS = {
    "official": v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomSolarize(threshold=128, p=0.2),
        ]
    ),
    "flip": v2.RandomHorizontalFlip(),
    "none": v2.Identity(),
}


def add_transforms(splits: DatasetDict, processor, augmentation: str) -> Callable:
    """Let each split turn its images into `pixel_values` as they are read, the training images augmented.

    Returns:
        The transform without augmentation.
    """

    def transform(augment):
        def apply(batch):
            images = [augment(image) for image in batch["image"]]
            batch["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": batch["pixel_values"], "labels": batch["label"]}

        return apply

    for split in splits:
        splits[split].set_transform(transform(AUGMENTATIONS[augmentation if split == "train" else "none"]))
    return transform(AUGMENTATIONS["none"])
