"""Image data of the examples: loads a folder, parquet files or a Hub data set, and converts images to `pixel_values`.

`load_splits(DataArguments("path/to/images"))` returns images and labels; after `add_transforms(splits, processor)`
each row has `pixel_values` and `labels`.
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, load_dataset
from datasets.features.features import register_feature
from image_files import check_image, is_image_file, list_files, open_image
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from pgn_peft.hub import plain_processor
from pgn_peft.nn.images import convert_image

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of the format `imagefolder`
LISTED = 10  # names in a message

# The twelve data sets of the paper: id on the Hub, configuration, column with the classes. Subsets of EuroSAT and
# CIFAR-100 have been run; the other entries come from the pages of the data sets.
PAPER = {
    "cifar100": ("uoft-cs/cifar100", None, "fine_label"),
    "cifar10": ("uoft-cs/cifar10", None, "label"),
    "flowers102": ("dpdl-benchmark/oxford_flowers102", None, "label"),
    "food101": ("ethz/food101", None, "label"),
    "eurosat": ("tanganke/eurosat", None, "label"),
    "sun397": ("tanganke/sun397", None, "label"),
    "ucf101": ("flwrlabs/ucf101", None, "label"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "label"),
    "oxford_pets": ("timm/oxford-iiit-pet", None, "label"),
    "dtd": ("tanganke/dtd", None, "label"),
    "resisc45": ("tanganke/resisc45", None, "label"),
    "clevr_count": ("clip-benchmark/wds_vtab-clevr_count_all", None, "cls"),
}

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


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(
        metadata={"help": "A folder of images or of parquet files, an id on the Hub, or a name in PAPER."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; by default the only column of images."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column with the classes; by default 'label'."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images only, the same share of each class."}
    )
    augmentation: str = field(
        default="official",
        metadata={
            "help": "flip, colour jitter, grayscale and solarize as in the official code; only 'flip'; or 'none'.",
            "choices": list(AUGMENTATIONS),
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the images in pixels; None: the model's."})


@dataclass
class UprightImage(Image):
    """A column of images, read as upright 8-bit RGB images; see `pgn_peft.nn.images.convert_image`.

    `datasets.Image(mode="RGB")` clips 16-bit pixels at 255, and its errors do not name the image.
    """

    _type: str = field(default="UprightImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Any:
        """Open an encoded image, a dictionary with `path` or `bytes`; return a decoded one unchanged."""
        if not isinstance(value, dict):
            return value
        path, content = value["path"], value["bytes"]
        if content is None and "://" in path:  # on the Hub
            return convert_image(super().decode_example(value, token_per_repo_id), name=path)
        return open_image(path if content is None else content, name=path)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it calls itself experimental
    register_feature(UprightImage, "UprightImage")


def say(message: str) -> None:
    """Print a message, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def list_names(names: list[str]) -> str:
    """List names, the first ones only if there are many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def class_names(rows: Dataset) -> list[str]:
    """Return the names of the classes of a split."""
    feature = rows.features["label"]
    return feature.feature.names if isinstance(feature, List) else feature.names


def load_splits(arguments: DataArguments, seed: int = 0, validation: float = 0.1, test: float = 0.1) -> DatasetDict:
    """Load images as splits train, validation and test, with the columns `image` and `label`.

    Args:
        arguments: what to load.
        seed: seed of the random choice of images for missing splits.
        validation: share of the training images to use for validation, if there is no such split.
        test: the same for test, if there is neither split.

    Returns:
        The splits. `label` is a `ClassLabel`, or a list of them where an image has several labels.

    Raises:
        ValueError: there are no training images, a column is missing, a class has too few images, a split has classes
            that the training images do not have, or an image cannot be read.
    """
    splits = name_splits(read_source(arguments.dataset), arguments.dataset)
    own = "label" if Path(arguments.dataset).exists() else PAPER.get(arguments.dataset, (None, None, "label"))[2]
    label_column = arguments.label_column or own
    splits = {name: name_columns(rows, arguments.image_column, label_column) for name, rows in splits.items()}
    splits = add_missing_splits(number_classes(splits), seed, validation, test)
    wanted, available = arguments.max_train_samples, len(splits["train"])
    if wanted is not None and wanted < available:
        if wanted < len(class_names(splits["train"])):
            raise ValueError(f"`max_train_samples` is {wanted}, less than one image of each class. Use more.")
        splits["train"] = splits["train"].select(spread(splits["train"], seed)[:wanted])
    check_images(splits)
    say(", ".join(f"{name} {len(rows)} images" for name, rows in splits.items()))
    return splits


def add_missing_splits(
    splits: dict[str, Dataset], seed: int = 0, validation: float = 0.1, test: float = 0.1
) -> DatasetDict:
    """Check the classes of splits, and split validation and test off the training images if they are missing."""
    check_classes(splits)
    splits = DatasetDict(splits)
    if "validation" not in splits:
        needs_test = test > 0 and "test" not in splits
        splits["train"], splits["validation"] = divide(splits["train"], validation, seed)
        if needs_test:
            splits["train"], splits["test"] = divide(splits["train"], test / (1 - validation), seed)
    return splits


def read_source(source: str) -> dict[str, Dataset]:
    """Open a folder, or a data set on the Hub."""
    folder = Path(source).expanduser()
    if folder.suffix == ".zip" and folder.is_file():
        raise ValueError(f"{source!r} is a zip file: unpack it, and give the folder with a subfolder for each class.")
    if folder.is_dir():
        return read_parquet(folder) or read_folder(folder)
    if source.startswith((".", "/", "~", "\\")):
        raise ValueError(f"There is no folder {source!r}. Look for a misspelt path.")
    name, configuration, _ = PAPER.get(source, (source, None, None))
    return load_dataset(name, configuration)


def read_parquet(folder: Path) -> dict[str, Dataset]:
    """Open the parquet files of a folder, which are named after their splits; empty if there are none."""
    files: dict[str, list[str]] = {}
    for file in list_files(folder):
        if file.suffix == ".parquet" and file.name not in METADATA:
            split = re.sub(r"-\d{5}-of-\d{5}.*", "", file.stem)  # shards, as on the Hub
            files.setdefault(split, []).append(glob.escape(str(file)))
    # One by one: loaded together, all splits would get the class names of the first.
    return {split: load_dataset("parquet", data_files=names, split="train") for split, names in files.items()}


def read_folder(folder: Path) -> dict[str, Dataset]:
    """Open a folder of images; see `find_classes`. Prints the splits and classes, and what is left out."""
    files = list_files(folder)
    if any(file.name in METADATA for file in files):
        return load_dataset("imagefolder", data_files=f"{glob.escape(str(folder))}/**")
    images = keep_images(files)
    found = find_classes([file.relative_to(folder) for file in images])
    return make_rows([str(file.absolute()) for file in images], found)


def keep_images(files: list[Path]) -> list[Path]:
    """Return the image files among some files, and print the kinds of the others."""
    if others := sorted({file.suffix or file.name for file in files if not is_image_file(file)}):
        say(f"left out: files of other kinds: {list_names(others)}")
    return [file for file in files if is_image_file(file)]


def make_rows(images: list[Any], found: dict[str, dict[str, list[int]]]) -> dict[str, Dataset]:
    """Make splits of images (paths of files, or Pillow images) from what `find_classes` returns."""
    names = sorted({name for classes in found.values() for name in classes})
    splits = {}
    for split, classes in found.items():
        counts = [f"{name} ({len(places)})" for name, places in sorted(classes.items())]
        say(f"{split}: {sum(map(len, classes.values()))} images in {len(classes)} classes: {list_names(counts)}")
        rows = {
            "image": [images[place] for name in classes for place in classes[name]],
            "label": [names.index(name) for name in classes for _ in classes[name]],
        }
        features = Features({"image": UprightImage(), "label": ClassLabel(names=names)})
        splits[split] = Dataset.from_dict(rows, features=features)
    return splits


def find_classes(paths: list[PurePath]) -> dict[str, dict[str, list[int]]]:
    """Find splits and classes in the paths of images.

    A folder that contains all others is skipped. A folder is a split if it is called train, validation (val, valid,
    dev) or test, and has its images in subfolders; then all folders must be splits. Where all folders have such a word
    in their names (training_set, test_set), or all classes have subfolders of such names, these are splits too.
    Otherwise each folder is a class, whatever its name, and images in its subfolders belong to it.

    Args:
        paths: relative paths of images.

    Returns:
        For each split, for each class, the indices of its images in `paths`.

    Raises:
        ValueError: there are no folders, or it is not clear whether a folder is a class or a split.
    """
    parts = [path.parts for path in paths]
    while parts and all(len(names) > 2 for names in parts) and len({names[0] for names in parts}) == 1:
        parts = [names[1:] for names in parts]
    loose = [str(path) for path, names in zip(paths, parts, strict=True) if len(names) == 1]
    if len(loose) == len(parts):
        found = f"{len(loose)} images, in no subfolder" if loose else "no images"
        raise ValueError(f"There are {found}. Put the images of each class into a subfolder with its name.")
    if loose:
        say(f"left out: images in no class's folder: {list_names(loose)}")
    split_of = {spelling: split for split, spellings in SPLIT_NAMES.items() for spelling in spellings}
    if all(len(names) > 2 and names[1].lower() in split_of and names[0].lower() not in split_of for names in parts):
        parts = [(names[1], names[0], *names[2:]) for names in parts]  # splits within classes
    # Archives often have each folder within one of the same name.
    parts = [names[1:] if len(names) > 3 and names[0] == names[1] else names for names in parts]
    folders = {names[0]: split_of.get(names[0].lower()) for names in parts if len(names) > 1}
    words = {name: {split_of.get(word) for word in re.split("[^a-z]+", name.lower())} - {None} for name in folders}
    if {"train"} in words.values() and all(len(splits) == 1 for splits in words.values()):
        folders = {name: splits.pop() for name, splits in words.items()}
    deep = sorted({names[0] for names in parts if len(names) > 2 and folders[names[0]]})
    found: dict[str, dict[str, list[int]]] = {}
    if deep:
        _check_splits(folders, deep, [names for names in parts if len(names) == 2])
        found["train"] = {}  # first
    classes = normalise_names([names[1 if deep else 0] if len(names) > 1 else "" for names in parts])
    for place, (names, name) in enumerate(zip(parts, classes, strict=True)):
        if len(names) > 1:
            split = folders[names[0]] if deep else "train"
            found.setdefault(split, {}).setdefault(name, []).append(place)
    return found


def _check_splits(folders: dict[str, str | None], deep: list[str], direct: list[tuple[str, ...]]) -> None:
    """Raise a ValueError if only some of the folders are splits, or several are the same split."""
    others = [name for name, split in folders.items() if split is None]
    if others:
        reason = f"{deep[0]!r} looks like a split, and {others[0]!r} beside it does not"
    elif direct:
        reason = f"{deep[0]!r} looks like a split, and {'/'.join(direct[0])!r} has no class then"
    elif "train" not in folders.values():
        reason = f"there is no 'train' beside {list_names(deep)}"
    elif len(set(folders.values())) < len(folders):
        reason = f"there are several folders for one split: {list_names(sorted(folders))}"
    else:
        return
    raise ValueError(
        f"It is not clear what are classes and what are splits: {reason}. Make a subfolder for each class, or the "
        "subfolders train, validation and test with a subfolder for each class in each."
    )


def normalise_names(names: list[str]) -> list[str]:
    """Convert names of classes to one form of Unicode (NFC): systems differ in writing "é" as one or two characters.

    Prints the names that occur in both forms, which become one class.
    """
    composed = [unicodedata.normalize("NFC", name) for name in names]
    spellings: dict[str, set[str]] = {}
    for name, given in zip(composed, names, strict=True):
        spellings.setdefault(name, set()).add(given)
    if several := sorted(name for name, given in spellings.items() if len(given) > 1):
        say(f"one class, though written in two forms of Unicode: {list_names(several)}")
    return composed


def name_splits(splits: dict[str, Dataset], dataset: str) -> dict[str, Dataset]:
    """Rename the splits to train, validation and test, and leave others out."""
    for name in SPLIT_NAMES["validation"]:
        if name in splits and "validation" not in splits:
            splits["validation"] = splits.pop(name)
    if "train" not in splits:
        raise ValueError(f"{dataset!r} has no split 'train', but {', '.join(splits)}. Rename its training split.")
    if others := [name for name in splits if name not in SPLIT_NAMES]:
        say(f"left out: splits that are not train, validation or test: {list_names(others)}")
    return {name: splits[name] for name in SPLIT_NAMES if name in splits}


def name_columns(rows: Dataset, image_column: str | None, label_column: str) -> Dataset:
    """Rename a split's columns to `image`, which is read as upright RGB, and `label`."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    image_column = image_column or (images[0] if len(images) == 1 else "image")
    for argument, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(f"There is no column {column!r}, but {columns}. Choose one with --{argument}.")
    columns = {image_column: "image", label_column: "label"}
    rows = rows.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    return rows.cast_column("image", UprightImage())


def number_classes(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number the classes of all splits together, in the order of the training split's class list, or else sorted.

    Lists of labels, of images that have several, stay lists. Splits other than train without any labels, such as the
    test split of a competition, are left out.
    """
    labels = {name: _read_labels(rows) for name, rows in splits.items()}
    if bare := [name for name, column in labels.items() if name != "train" and all(row is None for row in column)]:
        say(f"left out: splits without labels: {list_names(bare)}")
    found = {label for column in labels.values() for row in column for label in row or ()}
    numbers = all(isinstance(label, (int, float)) for label in found)
    given = [str(label) for label in (sorted(found) if numbers else sorted(found, key=str))]
    feature = splits["train"].features["label"]
    listed = isinstance(feature, List)
    declared = feature.feature if listed else feature
    if isinstance(declared, ClassLabel):
        given = [*declared.names, *(name for name in given if name not in declared.names)]
    places: dict[str, int] = {}
    place_of = {
        name: places.setdefault(composed, len(places))
        for name, composed in zip(given, normalise_names(given), strict=True)
    }
    one = ClassLabel(names=list(places))
    numbered = {}
    for name in splits:
        if name not in bare:
            column = [None if row is None else [place_of[str(label)] for label in row] for row in labels[name]]
            column = column if listed else [None if row is None else row[0] for row in column]
            rows = splits[name].remove_columns("label")
            numbered[name] = rows.add_column("label", column, feature=List(one) if listed else one)
    return numbered


def _read_labels(rows: Dataset) -> list[list[Any] | None]:
    """Return the names or numbers of each image's classes; None where it has none."""
    feature = rows.features["label"]
    column = rows["label"] if isinstance(feature, List) else [[label] for label in rows["label"]]
    declared = feature.feature if isinstance(feature, List) else feature
    names = declared.names if isinstance(declared, ClassLabel) else None
    read = []
    for row in column:
        bare = row is None or any(label in (None, -1) for label in row)
        read.append(None if bare else [names[label] if names else label for label in row])
    return read


def check_classes(splits: dict[str, Dataset]) -> None:
    """Check that every image has a class, and that the training images include all classes of the other splits.

    Prints the classes without images in a split.
    """
    names = class_names(splits["train"])
    trained: set[int] = set()
    for split, rows in splits.items():
        if None in rows["label"]:
            raise ValueError(f"Some images of {split!r} have no label (null or -1). Drop these rows.")
        found = {label for row in rows["label"] for label in (row if isinstance(row, list) else [row])}
        trained = trained or found
        if untrained := [names[label] for label in sorted(found - trained)]:
            raise ValueError(
                f"{split!r} has images of classes that 'train' has none of: {list_names(untrained)}. Add training "
                "images of them, or remove these."
            )
        if missing := [name for label, name in enumerate(names) if label not in found]:
            say(f"no images in {split!r} of: {list_names(missing)}")


def spread(rows: Dataset, seed: int) -> np.ndarray:
    """Return an order of the rows that begins with each class, and whose first n are stratified by class for any n."""
    several = isinstance(rows.features["label"], List)
    labels = np.zeros(len(rows), int) if several else np.array(rows["label"])
    order = np.random.default_rng(seed).permutation(len(rows))
    share = np.empty(len(rows))
    for label in np.unique(labels):
        places = order[labels[order] == label]
        share[places] = np.arange(len(places)) / len(places)
    return order[np.argsort(share[order], kind="stable")]


def divide(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of the images, stratified by class, with at least one image of each class."""
    several, names = isinstance(rows.features["label"], List), class_names(rows)
    number = max(1 if several else len(set(rows["label"])), round(share * len(rows)))
    order = spread(rows, seed)
    rest, chosen = rows.select(order[number:]), rows.select(order[:number])
    if not several and (lost := sorted(set(chosen["label"]) - set(rest["label"]))):
        raise ValueError(
            f"Too few images of {list_names([names[label] for label in lost])} to keep some for validation and test. "
            "Add images, or bring splits of your own."
        )
    return rest, chosen


def check_images(splits: DatasetDict) -> None:
    """Find images that cannot be read, before training.

    Headers are checked in all splits. Images of validation and test are also decoded, because a run reads them only
    after an epoch. A damaged training image stops the first epoch with an error that names it.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    bad = []
    for split, rows in splits.items():
        encoded = rows.select_columns("image").cast_column("image", Image(decode=False))
        check = check_image if split == "train" else open_image
        for index, row in enumerate(tqdm(encoded, desc=f"checking the images of {split}", leave=False, disable=None)):
            if row["image"] is None:
                bad.append(f"image {index} of {split} is missing (null): drop such rows first")
                continue
            path, content = row["image"]["path"], row["image"]["bytes"]
            if content is None and "://" in path:
                continue
            try:
                check(path if content is None else content, name=path or f"image {index} of {split}")
            except ValueError as error:
                bad.append(str(error))
    if bad:
        raise ValueError(f"{len(bad)} images cannot be read:\n" + "\n".join(bad[:LISTED]))


def load_processor(model_name_or_path: str, image_size: int | None = None, revision: str | None = None) -> Any:
    """Load the model's image processor, and set another image size if one is given."""
    processor = plain_processor(AutoImageProcessor.from_pretrained(model_name_or_path, revision=revision))
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        processor.size = {"shortest_edge": image_size} if "shortest_edge" in processor.size else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square
    return processor


@dataclass(frozen=True)
class Transform:
    """Convert rows of images and labels to tensors. Can be pickled, for a data loader's workers.

    Args:
        processor: image processor of the model.
        augmentation: a key of `AUGMENTATIONS`.
        num_labels: number of classes, if images have several labels; None: they have one.
    """

    processor: Any
    augmentation: str = "none"
    num_labels: int | None = None

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Convert the lists `image` and `label` to `pixel_values` (B, C, H, W), normalised, and `labels`."""
        images = [AUGMENTATIONS[self.augmentation](UprightImage().decode_example(row)) for row in rows["image"]]
        labels = rows["label"]
        if self.num_labels is not None:
            labels = [[float(label in row) for label in range(self.num_labels)] for row in labels]
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": labels}


def add_transforms(splits: DatasetDict, processor: Any, augmentation: str = "none") -> Dataset:
    """Let each split convert its images to `pixel_values` when they are read. Training images are augmented.

    Returns:
        The training images without augmentation.
    """
    several = isinstance(splits["train"].features["label"], List)
    num_labels = len(class_names(splits["train"])) if several else None
    for split, rows in splits.items():
        rows.set_transform(Transform(processor, augmentation if split == "train" else "none", num_labels))
    return splits["train"].with_transform(Transform(processor, "none", num_labels))


def smoke_arguments(folder: Path) -> list[str]:
    """Make a tiny ViT and a folder of images, red and blue, and return the command line that trains on them."""
    random = np.random.default_rng(0)
    for name, colour in {"blue": (40, 40, 200), "red": (200, 40, 40)}.items():
        folder.joinpath("images", name).mkdir(parents=True, exist_ok=True)
        for index in range(40):
            noise = random.integers(-40, 40, size=(40, 36, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            v2.functional.to_pil_image(pixels).save(folder / "images" / name / f"{index}.jpg")
    torch.manual_seed(0)
    tiny = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ViTForImageClassification(tiny).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return [
        *("--model_name_or_path", str(folder / "vit"), "--dataset", str(folder / "images")),
        *("--output_dir", str(folder / "adapter"), "--augmentation", "flip"),
        *("--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--use_cpu"),
    ]
