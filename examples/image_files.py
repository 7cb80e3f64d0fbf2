"""Image files: finding them in a folder, and opening them as upright images of 8-bit pixels. Pillow only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pgn_peft.nn.images import convert_image

# Written by macOS beside the files of an archive.
NOT_FOLDERS_OF_IMAGES = ("__MACOSX",)


def list_files(folder: str | Path) -> list[Path]:
    """List all files of a folder and its subfolders in order, except hidden ones.

    Symbolic links are followed, except links to a folder that contains them.

    Raises:
        OSError: a folder cannot be read.
    """
    return list(_walk(Path(folder), ()))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name in NOT_FOLDERS_OF_IMAGES:
            continue
        if entry.is_dir():
            if os.path.realpath(entry) not in above:
                yield from _walk(folder / entry.name, above)
        elif entry.is_file() or entry.is_symlink():  # opening a broken link raises an error that names it
            yield folder / entry.name


def is_image_file(path: Path) -> bool:
    """Whether a file has an extension of an image format that Pillow can open."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def open_image(file: str | Path | bytes, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Open an image as an upright one of 8-bit pixels; see `convert_image`.

    Args:
        file: the path of a file, or its content.
        mode: Pillow's name for the channels: "RGB", "L" or "RGBA".
        name: the image's name in error messages; None: the path.

    Raises:
        ValueError: the file does not exist, is not an image, is damaged, has more pixels than Pillow allows, or has
            pixels of an unknown range.
    """
    name = _name(file, name)
    return convert_image(_open(file, name, decode=True), mode, name)


def check_image(file: str | Path | bytes, name: str | None = None) -> None:
    """Check an image's header, without decoding the image.

    Args:
        file: the path of a file, or its content.
        name: the image's name in error messages; None: the path.

    Raises:
        ValueError: as for `open_image`, except that damaged pixels are not detected.
    """
    name = _name(file, name)
    if _open(file, name, decode=False).mode in ("I", "F"):  # their range shows only in the values
        open_image(file, "L", name)


def _name(file: str | Path | bytes, name: str | None) -> str:
    if name is None:
        return f"an image of {len(file)} bytes" if isinstance(file, bytes) else str(file)
    return name


def _open(file: str | Path | bytes, name: str, decode: bool) -> Image.Image:
    try:
        image = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
        with image:
            if decode:
                image.load()
        return image
    except Exception as error:  # decoders raise many types of errors for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            empty = not (len(file) if isinstance(file, bytes) else os.path.getsize(file))
            reason = "it is empty" if empty else "it is no image that Pillow can open"
        raise ValueError(
            f"`images` must all be readable, but got {name!r}: {reason}. Replace the file, or remove it."
        ) from error
