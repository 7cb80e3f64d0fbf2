"""What people upload: images, zips of images with a subfolder for each class, zips of adapters. Nothing is trusted.

Names inside a zip are read as names of classes only, and never as paths: every file that is unpacked gets a name that
is known here. Sizes are counted while unpacking, because a zip can lie about them.
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

# Of which the first two must be there.
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
LARGEST_SIDE = 1024  # pixels; larger images are made smaller
MARKED_UTF_8 = 0x800  # among a file's flags in a zip
# Pillow would hand other kinds to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = 25 * 10**6  # an image of twice as many is refused
DAMAGES = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error)


def read_image(file: Path, name: str) -> Image.Image:
    """Open an image as an upright RGB one of at most 1,024 pixels a side.

    Raises:
        ValueError: it cannot be read; the message calls it `name`.
    """
    try:
        with Image.open(file, formats=FORMATS):
            pass
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        reason = "has too many pixels" if isinstance(error, Image.DecompressionBombError) else "cannot be read"
        raise ValueError(f"The image {name!r} {reason}. Images can be of the kinds {', '.join(FORMATS)}.") from error
    image = open_image(file, name=name)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def read_zip(file: Path, folder: Path) -> DatasetDict:
    """Unpack the images of a zip, and split a fifth of them off for validation where it has no such folder.

    Args:
        file: the zip, with folders as `image_data.find_classes` describes them.
        folder: is made, and removed again if there is an error.

    Raises:
        ValueError: it is no zip, is too large, has no two classes, or holds an image that cannot be read.
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
            if max(image.size) == LARGEST_SIDE:  # it may have been larger
                image.save(targets[-1], "PNG")
        splits = make_rows([str(target) for target in targets], found)
        return add_missing_splits(splits, validation=0.2, test=0)


def read_adapter(file: Path, folder: Path) -> Path:
    """Unpack an adapter's files out of a zip into a folder, which is removed again if there is an error."""
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
    """Yield a function for each file of a zip, which unpacks it if it has at most so many bytes; make a folder."""
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
    """Return the names in a zip as they were written.

    A zip marks names that are in UTF-8. Other names are in an encoding of the computer that made the zip: UTF-8 if all
    of them can be read so, or else one that cannot be known, because most encodings have letters for all bytes.

    Raises:
        ValueError: names are in another encoding than UTF-8.
    """
    names = []
    for member in members:
        name = member.orig_filename
        if not member.flag_bits & MARKED_UTF_8:  # `zipfile` has read it as CP437
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
