"""What people upload: images, zips of images with a subfolder for each class, zips of adapters. Nothing is trusted.

Names inside a zip are read as names of classes only, and never as paths: every file that is unpacked gets a name that
is known here. Sizes are counted while unpacking, because a zip can lie about them.
"""

from __future__ import annotations

import lzma
import shutil
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from image_files import is_image_file, list_files, open_image
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
FEWEST_OF_A_CLASS = 2  # one to train on, one to measure with
LARGEST_SIDE = 1024  # pixels; larger images are made smaller
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")
# Pillow would hand other kinds to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = 25 * 10**6  # an image of twice as many is refused

Labelled = list[tuple[Path, str]]  # images with the names of their classes
Damages = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
    zlib.error,
    lzma.LZMAError,
)


def read_image(file: Path, name: str) -> Image.Image:
    """Open an image as an upright RGB one of at most 1,024 pixels a side.

    Raises:
        ValueError: it cannot be read; the message calls it `name`.
    """
    try:
        with Image.open(file, formats=FORMATS):
            pass
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        reason = "it has too many pixels" if isinstance(error, Image.DecompressionBombError) else "it cannot be read"
        raise ValueError(
            f"`images` must be readable ones of the kinds {', '.join(FORMATS)}, but got {name!r}: {reason}. Replace "
            "the file, or remove it."
        ) from error
    image = open_image(file, name=name)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def read_folder(folder: Path) -> Labelled:
    """List the images of a folder with a subfolder for each class.

    Raises:
        ValueError: it is no such folder, or an image cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(
            f"`folder` must be a folder on this machine, but got {str(folder)!r}. Look for a misspelt path."
        )
    files = [file for file in list_files(folder) if is_image_file(file)]
    names = [file.relative_to(folder).as_posix() for file in files]
    images = list(zip(files, _classes([PurePosixPath(name) for name in names]), strict=True))
    _check_classes(images)
    for file, name in zip(files, names, strict=True):
        read_image(file, name)
    return images


def read_zip(file: Path, folder: Path) -> Labelled:
    """Unpack the images of a zip into a folder, which is removed again if there is an error.

    Args:
        file: the zip: a subfolder for each class, perhaps within one more folder, or within folders called train and
            test, which are put together.
        folder: is made.

    Raises:
        ValueError: it is no zip, is too large, has no classes, or holds an image that cannot be read.
    """
    with _opened(file) as archive, _removed_after_errors(folder):
        members = [member for member in archive.infolist() if _may_be_image(member)]
        paths = [_path(member) for member in members]
        targets = [folder / f"{index}{path.suffix.lower()}" for index, path in enumerate(paths)]
        images = list(zip(targets, _classes(paths), strict=True))
        _check_classes(images)
        room = MOST_UNPACKED
        for target, member, path in zip(targets, members, paths, strict=True):
            content = _read(archive, member, room)
            room -= len(content)
            target.write_bytes(content)
            image = read_image(target, str(path))
            if max(image.size) == LARGEST_SIDE:  # it may have been larger
                image.save(target, "PNG")
        return images


def read_adapter(file: Path, folder: Path) -> Path:
    """Unpack an adapter's files out of a zip into a folder, which is removed again if there is an error.

    Raises:
        ValueError: it is no zip, is too large, or holds no adapter.
    """
    with _opened(file) as archive, _removed_after_errors(folder):
        members = {_path(member): member for member in archive.infolist() if not member.is_dir()}
        configs = [path for path in members if path.name == "adapter_config.json"]
        parent = min((path.parent for path in configs), key=lambda path: len(path.parts), default=PurePosixPath())
        found = {name: members[parent / name] for name in ADAPTER_FILES if parent / name in members}
        for name in ADAPTER_FILES[:2]:
            if name not in found:
                raise ValueError(
                    f"`adapter` must be a zip with {name}, but got {len(members)} files without. Zip what "
                    "`Classifier.save_pretrained` has written."
                )
        room = MOST_UNPACKED
        for name, member in found.items():
            content = _read(archive, member, room)
            room -= len(content)
            folder.joinpath(name).write_bytes(content)
    return folder


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    size = file.stat().st_size
    if size > MOST_UPLOADED:
        raise ValueError(
            f"`zip` must have at most {_megabytes(MOST_UPLOADED)}, but got {_megabytes(size)}. Use fewer images."
        )
    with _explained():
        archive = zipfile.ZipFile(file)
    with archive:
        members = archive.infolist()
        if len(members) > MOST_FILES:
            raise ValueError(
                f"`zip` must hold at most {MOST_FILES:,} files, but got {len(members):,}. Use fewer images."
            )
        for member in members:
            path = _path(member)
            if path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]:
                raise ValueError(
                    f"`zip` must hold files of its own, but got {member.filename!r}, which lies outside of it. "
                    "Make the zip again."
                )
        yield archive


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Damages as error:
        raise ValueError(f"`zip` must be a whole zip without a password, but got {error}. Make it again.") from error


@contextmanager
def _removed_after_errors(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def _path(member: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(member.filename.replace("\\", "/"))


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: int) -> bytes:
    """Unpack one file of at most so many bytes, whatever the zip says of its size."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"`zip` must be packed as usual, but got another method for {member.filename!r}. Make it again."
        )
    with _explained(), archive.open(member) as file:
        content = file.read(room + 1)
    if len(content) > room:
        raise ValueError(
            f"`zip` must unpack to at most {_megabytes(MOST_UNPACKED)}, but got more. Use smaller images."
        )
    return content


def _may_be_image(member: zipfile.ZipInfo) -> bool:
    path = _path(member)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not member.is_dir() and not hidden and is_image_file(Path(path.name))


def _classes(paths: list[PurePosixPath]) -> list[str]:
    """Return the class of each image: its folder below what all share, and below train, validation and test."""
    parts = [path.parts for path in paths]
    while parts and all(len(names) > 2 for names in parts) and len({names[0] for names in parts}) == 1:
        parts = [names[1:] for names in parts]
    in_splits = bool(parts) and all(names[0].lower() in SPLITS for names in parts if len(names) > 1)
    if in_splits and any(len(names) > 2 for names in parts):
        # Below train and test there must be classes.
        parts = [names[1:] if len(names) > 1 else names for names in parts]
    if loose := [str(path) for path, names in zip(paths, parts, strict=True) if len(names) < 2]:
        raise ValueError(
            f"`images` must lie in subfolders, one for each class, but got {loose[0]!r} and {len(loose) - 1} more "
            "outside of any. Put the images of each class into a folder with its name."
        )
    return [unicodedata.normalize("NFC", names[0]) for names in parts]


def _check_classes(images: Labelled) -> None:
    if len(images) > MOST_IMAGES:
        raise ValueError(f"`images` must be at most {MOST_IMAGES:,}, but got {len(images):,}. Use fewer.")
    counts = Counter(name for _, name in images)
    if len(counts) < 2:
        found = f"{len(images)} images of {', '.join(counts) or 'no class'}"
        raise ValueError(
            f"`images` must be of two classes at least, but got {found}. Make a subfolder with images for each class."
        )
    if len(counts) > MOST_CLASSES:
        raise ValueError(f"`images` must be of at most {MOST_CLASSES} classes, but got {len(counts)}. Use fewer.")
    name, fewest = counts.most_common()[-1]
    if fewest < FEWEST_OF_A_CLASS:
        raise ValueError(
            f"`images` must be {FEWEST_OF_A_CLASS} at least of each class, but got {fewest} of {name!r}: one is kept "
            "to measure with. Add images of it."
        )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MB"
