"""Image files and folders of images for `train_image_classifier.py`: what is a class, what is a split."""

from __future__ import annotations

import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from datasets.features.features import register_feature
from image_files import check_image, is_image_file, list_files, open_image
from tqdm import tqdm

from pgn_peft.nn.images import convert_image

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files of the `imagefolder` format that say what the classes are.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Names that a message lists.
LISTED = 10


@dataclass
class UprightImage(Image):
    """A column of images, read as upright RGB ones of 8-bit pixels: see `pgn_peft.nn.images.convert_image`.

    `datasets.Image(mode="RGB")` clips wider pixels at 255, and its errors do not name the image.
    """

    _type: str = field(default="UprightImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Any:
        """Open an encoded image, a dictionary with `path` or `bytes`; return a decoded one as it is.

        Raises:
            ValueError: the image cannot be read.
        """
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
    """Print a message, in one of several processes only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def count(number: int, noun: str, ending: str = "s") -> str:
    """Write a number and its noun, in the plural where it needs one."""
    return f"{number} {noun}{'' if number == 1 else ending}"


def list_names(names: list[str]) -> str:
    """List names, the first ones only if there are many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def read_folder(folder: Path) -> dict[str, Dataset]:
    """Read a folder with a subfolder for each class, or one for each split with subfolders for the classes.

    A subfolder is a split if it is called train, validation (val, valid, dev) or test, and has its images in
    subfolders. Then all subfolders must be splits. Otherwise each subfolder is a class, whatever it is called, with
    the images in its own subfolders. What was understood is printed.

    Returns:
        The splits, with the columns `image` (the files' paths) and `label`.

    Raises:
        SystemExit: there are no images in subfolders, or it is not clear whether a subfolder is a class or a split.
    """
    images, others = [], []
    for file in list_files(folder):
        (images if is_image_file(file) else others).append(file.relative_to(folder))
    loose = [str(file) for file in images if len(file.parts) == 1]
    metadata = [str(file) for file in others if file.name in METADATA]
    if metadata and loose and len(loose) == len(images):
        return load_dataset("imagefolder", data_files=f"{glob.escape(str(folder))}/*")
    if metadata:
        raise SystemExit(
            f"`dataset` must be a folder of images with one subfolder a class, but got {str(folder)!r} with "
            f"{metadata[0]!r}. Remove that file, or save the images as parquet files: "
            "load_dataset('imagefolder', data_dir=...)['train'].to_parquet('train.parquet')."
        )
    if len(loose) == len(images):
        found = f"{count(len(loose), 'image')} and no subfolders" if loose else f"no images ({_count_endings(others)})"
        raise SystemExit(
            f"`dataset` must be a folder of images with one subfolder a class, or of parquet files, but got "
            f"{str(folder)!r} with {found}. Put the images of each class into a subfolder named after it."
        )
    if unnamed := [str(file) for file in images if not _is_utf_8(str(file))]:
        raise SystemExit(
            f"`dataset` must have names of files in UTF-8, but got {unnamed[0]!a} in {str(folder)!r}. Rename it."
        )
    images = [file for file in images if len(file.parts) > 1]
    _say_what_is_left_out(folder, images, others, loose)
    splits, depth = _find_splits(folder, images)
    names = sorted({name for classes in splits.values() for name in classes})
    return {split: _make_rows(folder, split, classes, depth, names) for split, classes in splits.items()}


def _is_utf_8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _find_splits(folder: Path, images: list[Path]) -> tuple[dict[str, dict[str, list[Path]]], int]:
    """Sort images into splits and classes; and say which part of their paths is the class."""
    subfolders = _group(images, 0)
    split_of = {spelling: split for split, spellings in SPLIT_NAMES.items() for spelling in spellings}
    found = {name: split_of.get(name.lower()) for name in subfolders}
    deep = [name for name, split in found.items() if split and any(len(file.parts) > 2 for file in subfolders[name])]
    if not deep:
        return {"train": subfolders}, 0
    reason = None
    for name, files in subfolders.items():
        direct = [file for file in files if len(file.parts) == 2]
        if found[name] is None:
            reason = f"{deep[0]!r}, which looks like a split, beside {name!r}, which does not"
        elif direct:
            reason = f"{deep[0]!r}, which looks like a split, and {str(direct[0])!r}, which then has no class"
    if reason is None and "train" not in found.values():
        reason = f"{', '.join(map(repr, deep))}, which look like splits, without 'train'"
    if reason is None and len(set(found.values())) < len(found):
        reason = f"several folders for one split: {', '.join(map(repr, found))}"
    if reason is not None:
        raise SystemExit(
            f"`dataset` must have one subfolder a class, or the subfolders train, validation and test with one "
            f"subfolder a class in each, but got {reason}, in {str(folder)!r}. Rename the folder if it is a class; "
            "move away what belongs to no split."
        )
    train_first = sorted(found, key=lambda name: found[name] != "train")
    return {found[name]: _group(subfolders[name], 1) for name in train_first}, 1


def _group(files: list[Path], place: int) -> dict[str, list[Path]]:
    """Sort files by one part of their paths."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parts[place], []).append(file)
    return groups


def _say_what_is_left_out(folder: Path, images: list[Path], others: list[Path], loose: list[str]) -> None:
    if loose:
        say(f"left out: {count(len(loose), 'image')} in no class's folder: {list_names(loose)}")
    if others:
        say(f"left out: {_count_endings(others)}")
    used = {file.parts[0] for file in images}
    empty = [path.name for path in folder.iterdir() if path.is_dir() and path.name not in used]
    if empty := sorted(name for name in empty if not name.startswith(".")):
        say(f"left out: folders without images: {list_names(empty)}")


def _count_endings(files: list[Path]) -> str:
    endings = Counter(file.suffix.lower() or file.name for file in files)
    listed = list_names([f"{count} {ending}" for ending, count in endings.most_common()])
    return f"{count(len(files), 'file')} of other kinds" + (f": {listed}" if listed else "")


def _make_rows(folder: Path, split: str, classes: dict[str, list[Path]], depth: int, names: list[str]) -> Dataset:
    images = count(sum(map(len, classes.values())), "image")
    counts = [f"{name} ({len(files)})" for name, files in classes.items()]
    say(f"{folder}: {split}: {images} in {count(len(classes), 'class', 'es')}: {list_names(counts)}")
    for name, files in classes.items():
        inner = sorted({file.parts[depth + 1] for file in files if len(file.parts) > depth + 2})
        if inner:
            say(f"{folder}: {split}: class {name} has the images of its subfolders too: {list_names(inner)}")
    paths = [str(folder.absolute() / file) for files in classes.values() for file in files]
    labels = [names.index(name) for name, files in classes.items() for _ in files]
    return Dataset.from_generator(
        _rows,
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
        # The times are part of the name under which the rows, and what is made of them, are cached.
        gen_kwargs={"paths": paths, "labels": labels, "times": [_changed(path) for path in paths]},
    )


def _changed(path: str) -> int:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0  # a broken link


def _rows(paths: list[str], labels: list[int], times: list[int]) -> Iterator[dict[str, Any]]:
    for path, label in zip(paths, labels, strict=True):
        yield {"image": path, "label": label}


def check_images(splits: dict[str, Any]) -> None:
    """Look for images that cannot be read before a run depends on them.

    Headers are checked in all splits. Images of validation and test are decoded too, since a run meets the first
    of them after an epoch, and the last after training. A damaged training image ends the first epoch, with its name.

    Raises:
        SystemExit: there are such images; the message names them.
    """
    bad = []
    for split, rows in splits.items():
        encoded = rows.select_columns("image").cast_column("image", Image(decode=False))
        check = check_image if split == "train" else open_image
        for index, row in enumerate(tqdm(encoded, desc=f"checking the images of {split}", leave=False, disable=None)):
            path, content = row["image"]["path"], row["image"]["bytes"]
            if content is None and "://" in path:
                continue
            name = path or f"image {index} of {split}"
            try:
                check(path if content is None else content, name=name)
            except ValueError as error:
                bad.append(error)
    if bad:
        raise SystemExit(
            f"`dataset` must hold images that can be read, but got {len(bad)} that cannot:\n"
            + "\n".join(map(str, bad[:LISTED]))
        )
