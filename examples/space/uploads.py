"""Untrusted uploads: images, zips of images with a subfolder for each class, zips of adapters.

Names inside a zip are used only as names of classes, never as paths: every unpacked file gets a name of ours. Sizes
are counted while unpacking, because a zip can declare wrong ones.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from datasets import DatasetDict
from image_data import add_missing_splits, find_classes, is_image_file, make_rows, open_image
from PIL import Image

# The first two are required.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
)
MOST_UPLOADED = 50 * 2**20  # bytes
MOST_UNPACKED = 250 * 2**20  # bytes
MOST_FILES = 4000  # in a zip
MOST_IMAGES = 2000
MOST_CLASSES = 200
LARGEST_SIDE = 1024  # pixels; larger images are scaled down
MARKED_UTF_8 = 0x800  # the flag of a file in a zip
# For some other formats, Pillow would run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = 25 * 10**6  # Pillow refuses images of twice as many
DAMAGES = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error)


def read_image(file: Path, name: str) -> Image.Image:
    """Open an image as an upright RGB one of at most 1,024 pixels a side.

    Raises:
        ValueError: the image cannot be read; the message names it `name`.
    """
    try:
        with Image.open(file, formats=FORMATS):
            pass
    except Exception as error:  # decoders raise many types of errors for damaged files
        reason = "has too many pixels" if isinstance(error, Image.DecompressionBombError) else "cannot be read"
        raise ValueError(f"The image {name!r} {reason}. Images can be of the kinds {', '.join(FORMATS)}.") from error
    image = open_image(file, name=name)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def read_zip(file: Path, folder: Path) -> DatasetDict:
    """Unpack the images of a zip, and split a fifth of them off for validation if it has no such folder.

    Args:
        file: the zip, with folders as `image_data.find_classes` describes them.
        folder: a new folder for the images, which is removed after an error.

    Raises:
        ValueError: the file is not a zip, is too large, has fewer than two classes, or contains an image that cannot
            be read.
    """
    with _opened(file, folder) as members:
        images = {path: read for path, read in members.items() if is_image_file(Path(path.name))}
        found = find_classes(list(images))
        classes = {name for split in found.values() for name in split}
        if len(images) > MOST_IMAGES or not 2 <= len(classes) <= MOST_CLASSES:
            raise ValueError(
                f"The zip has {len(images):,} images of {len(classes)} classes; possible are {MOST_IMAGES:,} images "
                f"of 2 to {MOST_CLASSES} classes."
            )
        targets, room = [], MOST_UNPACKED
        for index, (path, read) in enumerate(images.items()):
            targets.append(folder / f"{index}{path.suffix.lower()}")
            room -= targets[-1].write_bytes(read(room))
            image = read_image(targets[-1], str(path))
            if max(image.size) == LARGEST_SIDE:  # it may have been scaled down
                image.save(targets[-1], "PNG")
        splits = make_rows([str(target) for target in targets], found)
        return add_missing_splits(splits, validation=0.2, test=0)


def read_adapter(file: Path, folder: Path) -> Path:
    """Unpack an adapter's files from a zip into a new folder, which is removed after an error."""
    with _opened(file, folder) as members:
        configs = [path for path in members if path.name == ADAPTER_FILES[0]]
        parent = min((path.parent for path in configs), key=lambda path: len(path.parts), default=PurePosixPath())
        if any(parent / name not in members for name in ADAPTER_FILES[:2]):
            raise ValueError("The zip holds no adapter. Zip what `Classifier.save_pretrained` has written.")
        room = MOST_UNPACKED
        for name in ADAPTER_FILES:
            if parent / name in members:
                room -= folder.joinpath(name).write_bytes(members[parent / name](room))
    return folder


@contextmanager
def _opened(file: Path, folder: Path) -> Iterator[dict]:
    """Create a folder, and yield for each file of a zip a function that unpacks it, up to a number of bytes."""
    if file.stat().st_size > MOST_UPLOADED:
        raise ValueError(f"The zip has more than {_megabytes(MOST_UPLOADED)}. Use fewer images.")
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise ValueError("The zip is packed in an unusual way. Make it again.")
            if len(members) > MOST_FILES:
                raise ValueError(f"The zip has more than {MOST_FILES:,} files. Use fewer images.")
            paths = [PurePosixPath(name.replace("\\", "/")) for name in member_names(members)]

            def reader(member: zipfile.ZipInfo):
                def read(room: int) -> bytes:
                    with archive.open(member) as opened:
                        content = opened.read(room + 1)
                    if len(content) > room:
                        raise ValueError(
                            f"The zip unpacks to more than {_megabytes(MOST_UNPACKED)}. Use smaller images."
                        )
                    return content

                return read

            yield {
                path: reader(member)
                for path, member in zip(paths, members, strict=True)
                if not any(part.startswith((".", "__MACOSX")) for part in path.parts)
            }
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, DAMAGES):
            raise ValueError(f"The zip is damaged or has a password ({error}). Make it again.") from error
        raise


def member_names(members: list[zipfile.ZipInfo]) -> list[str]:
    """Return the names in a zip, decoded.

    A zip marks names that are in UTF-8. Unmarked names are in an encoding of the computer that made the zip: UTF-8 if
    they can be decoded so, or else an unknown one, because most encodings have characters for all bytes.

    Raises:
        ValueError: names are in another encoding than UTF-8.
    """
    names = []
    for member in members:
        name = member.orig_filename
        if not member.flag_bits & MARKED_UTF_8:  # `zipfile` has decoded it as CP437
            try:
                name = name.encode("cp437").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"The names in this zip are not in UTF-8 ({name!r} is one of them), and their encoding is not "
                    "known. Give the folders names in plain letters (a-z), or make the zip with UTF-8 names: zip on "
                    "Linux and macOS does, 7-Zip with the parameter cu=on."
                ) from error
        names.append(name)
    return names


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MB"
