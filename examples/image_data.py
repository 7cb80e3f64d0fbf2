"""Images for `train_image_classifier.py`: where they come from, and how they are split."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from huggingface_hub.errors import HFValidationError
from image_files import list_files
from image_folder import METADATA, SPLIT_NAMES, UprightImage, check_images, count, list_names, read_folder, say
from recipes import RECIPES, Recipe
from transformers import AutoImageProcessor

from pgn_peft.hub import plain_processor
from pgn_peft.hub.image_size import made_size


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
    cache_images: bool = field(
        default=False, metadata={"help": "Decode, resize and crop the images once, and keep their pixels on disk."}
    )

    def __post_init__(self) -> None:
        if self.dataset.startswith("~"):  # a shell does not expand it everywhere
            self.dataset = str(Path(self.dataset).expanduser())


def load_splits(arguments: DataArguments, seed: int) -> DatasetDict:
    """Load the images as splits train, validation and test, with the columns `image` and `label` (a `ClassLabel`).

    A source without validation images gives a tenth of its training images for it; one that has neither gives another
    tenth for test. One with validation images only is left without test.

    Raises:
        SystemExit: there are no training images, a column is missing, a class is too small to be split, a split has
            classes that the training images have not, or an image cannot be read.
    """
    recipe = find_recipe(arguments.dataset)
    splits = name_splits(_read(recipe.dataset, recipe.configuration), arguments.dataset)
    splits = {name: name_columns(splits[name], arguments, recipe) for name in SPLIT_NAMES if name in splits}
    splits = DatasetDict(number_classes(splits))
    check_classes(splits, splits["train"].features["label"].names)
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
    check_images(splits)
    say(", ".join(f"{name} {count(len(rows), 'image')}" for name, rows in splits.items()))
    return splits


def find_recipe(dataset: str) -> Recipe:
    """Return where a data set is: a folder, a name in recipes.py, or an id on the Hub."""
    recipe = Recipe(dataset)
    return recipe if Path(dataset).exists() else RECIPES.get(dataset, recipe)


def name_splits(splits: dict[str, Dataset], dataset: str) -> dict[str, Dataset]:
    """Give the splits the names train, validation and test, and leave others out."""
    for name in SPLIT_NAMES["validation"]:
        if name in splits and "validation" not in splits:
            splits["validation"] = splits.pop(name)
    if "train" not in splits:
        raise SystemExit(
            f"`dataset` must have a split 'train', but got {dataset!r} with {', '.join(splits)}. Rename its training "
            "split."
        )
    if others := [name for name in splits if name not in SPLIT_NAMES]:
        say(f"left out: splits that are not train, validation or test: {list_names(others)}")
    return {name: rows for name, rows in splits.items() if name in SPLIT_NAMES}


def name_columns(rows: Dataset, arguments: DataArguments, recipe: Recipe) -> Dataset:
    """Give a split's columns the names `image`, read as upright RGB, and `label`."""
    columns = {
        arguments.image_column or recipe.image_column: "image",
        arguments.label_column or recipe.label_column: "label",
    }
    names = rows.column_names
    for column in columns:
        if column not in names:
            raise SystemExit(
                f"`image_column` and `label_column` must be columns of the data set, but got {column!r}. It has: "
                f"{', '.join(names)}. Name the columns to use."
            )
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({old: new for old, new in columns.items() if old != new})
    return rows.cast_column("image", UprightImage())


def number_classes(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number classes that are given by names or numbers, over all splits together."""
    if all(isinstance(rows.features["label"], ClassLabel) for rows in splits.values()):
        return splits
    labels = {name: _read_labels(rows) for name, rows in splits.items()}
    found = {label for values in labels.values() for label in values if label is not None}
    numbers = all(isinstance(label, (int, float)) for label in found)
    classes = sorted(found) if numbers else sorted(map(str, found))
    index = {label if numbers else str(label): place for place, label in enumerate(classes)}
    feature = ClassLabel(names=[str(label) for label in classes])
    for name, rows in splits.items():
        column = [None if label is None else index[label if numbers else str(label)] for label in labels[name]]
        splits[name] = rows.remove_columns("label").add_column("label", column, feature=feature)
    return splits


def _read_labels(rows: Dataset) -> list[Any]:
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return [None if label in (None, -1) else feature.int2str(label) for label in rows["label"]]
    return list(rows["label"])


def find_parquet(source: str) -> dict[str, list[str]]:
    """Return the parquet files of each split in a folder; nothing for a folder of images, or the id of a data set."""
    files: dict[str, list[str]] = {}
    for file in list_files(source) if Path(source).is_dir() else ():
        if file.suffix == ".parquet" and file.name not in METADATA:
            split = re.sub(r"-\d{5}-of-\d{5}.*", "", file.stem)  # as data sets are cut on the Hub
            files.setdefault(split, []).append(str(file))
    return files


def _read(source: str, configuration: str | None) -> dict[str, Dataset]:
    if files := find_parquet(source):
        return {name: read_parquet(names) for name, names in files.items()}
    return read_folder(Path(source)) if Path(source).is_dir() else read_source(source, configuration)


def read_parquet(files: list[str]) -> Dataset:
    """Open the parquet files of one split: together, all would get the class names of the first, wrong or not."""
    files = [glob.escape(file) for file in files]  # it takes names for patterns
    return load_dataset("parquet", data_files=files, split="train")


def read_source(source: str, configuration: str | None) -> dict[str, Dataset]:
    """Open a data set on the Hub."""
    try:
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


def check_classes(splits: dict[str, Dataset], names: list[str]) -> None:
    """Check that every image has one of these classes, and that the training images show all that others have.

    Prints which classes a split has no images of.

    Raises:
        SystemExit: an image has no class, or one that the training images have not.
    """
    found = {split: set(rows["label"]) for split, rows in splits.items()}
    for split, rows in splits.items():
        labels = found[split]
        if None in labels or -1 in labels:
            raise SystemExit(f"`label` must be there for every image, but got none for some in {split!r}. Drop them.")
        if rows.features["label"].names != names or not labels <= set(range(len(names))):
            raise SystemExit(
                f"`label` must have the same classes in all splits, but got other ones in {split!r}: "
                f"{list_names(rows.features['label'].names)}; not {list_names(names)}. Rebuild the splits from one "
                "data set."
            )
        if untrained := [names[label] for label in sorted(labels - found.get("train", labels))]:
            raise SystemExit(
                f"`label` must be a class of the training images, but got others in {split!r}: "
                f"{list_names(untrained)}. Add training images of them, or remove these."
            )
        if missing := [name for label, name in enumerate(names) if label not in labels]:
            say(f"no images in {split!r} of {count(len(missing), 'class', 'es')}: {list_names(missing)}")


def load_processor(model_name_or_path: str, image_size: int | None, revision: str | None = None):
    """Load the model's image processor, set to another image size if asked for."""
    processor = plain_processor(AutoImageProcessor.from_pretrained(model_name_or_path, revision=revision))
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        processor.size = {"shortest_edge": image_size} if "shortest_edge" in processor.size else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square
    return processor


def made_side(processor) -> int | None:
    """Return the side of what an image processor makes of a square image, in pixels; None if that is no square."""
    height, width = made_size(processor, (64, 64))
    return height if height == width else None
