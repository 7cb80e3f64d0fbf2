"""Images of all of Pillow's modes, of sides from 1 to 10,000 pixels, and files that are cut. See `faults.py`."""

from __future__ import annotations

import colorsys
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import predict
from fault_files import Material, equal
from fault_outcomes import Tally, judge
from image_data import Transform
from PIL import Image
from torch import Tensor

from pgn_peft import ImagePrompter

# Width and height.
SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 7),
    (31, 33),
    (32, 32),
    (100, 64),
    (1000, 10),
    (1, 10_000),
    (10_000, 1),
    (2000, 2000),
]
NEUTRAL = 128  # of the axes a and b
LARGEST = (10_000, 10_000)
FORMATS = {
    "PNG": ("1", "L", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "RGB"),
    "TIFF": ("1", "L", "RGB", "CMYK", "F", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "RGB"),
    "JPEG2000": ("L", "RGB"),
    "ICO": ("RGBA",),
    "AVIF": ("RGB",),
}


def noise(width: int, height: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8).reshape(*values.shape[:2], 1), 3, axis=2)


def image_of(mode: str, width: int, height: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray | None]:
    """Make an image of a mode, and the 8-bit RGB pixels (H, W, 3) that it stands for; None where nobody knows.

    The pixels follow from the definition of the mode, not from Pillow.
    """
    if mode == "1":
        bits = noise(width, height, 1, rng)[:, :, 0] > 127
        return Image.fromarray((bits * 255).astype(np.uint8)).convert("1", dither=Image.Dither.NONE), grey(bits * 255)
    if mode in ("L", "LA", "La"):
        values = noise(width, height, 1, rng)[:, :, 0]
        image = Image.fromarray(values)
        if mode != "L":  # opaque, so that premultiplying changes nothing
            image = Image.merge("LA", (image, Image.new("L", image.size, 255)))
            image = image if mode == "LA" else image.convert("La")
        return image, grey(values)
    if mode in ("P", "PA"):
        values, palette = noise(width, height, 1, rng)[:, :, 0] % 200, noise(200, 1, 3, rng)[0]
        image = Image.fromarray(values, "P") if mode == "P" else Image.fromarray(values).convert("P")
        image.putpalette(palette.tobytes())
        return (image if mode == "P" else image.convert("PA")), palette[values]
    if mode in ("RGB", "RGBA", "RGBX", "RGBa"):
        values = noise(width, height, 3, rng)
        image = Image.fromarray(values)
        if mode in ("RGBA", "RGBa"):
            alpha = 255 if mode == "RGBa" else int(rng.integers(0, 256))
            image.putalpha(alpha)
            image = image if mode == "RGBA" else image.convert("RGBa")
        elif mode == "RGBX":
            image = image.convert("RGBX")
        return image, values
    if mode == "CMYK":
        values = noise(width, height, 4, rng)
        ink, black = 255 - values[:, :, :3].astype(float), 255 - values[:, :, 3:].astype(float)
        return Image.frombytes("CMYK", (width, height), values.tobytes()), (ink * black / 255).round().astype(np.uint8)
    if mode == "YCbCr":
        values = noise(width, height, 3, rng)
        luma, blue, red = (values[:, :, channel].astype(float) - (0, 128, 128)[channel] for channel in range(3))
        channels = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
        pixels = np.stack(channels, axis=2).round().clip(0, 255).astype(np.uint8)
        return Image.frombytes("YCbCr", (width, height), values.tobytes()), pixels
    if mode == "HSV":
        values = np.repeat(noise(1, 1, 3, rng), height, axis=0).repeat(width, axis=1)  # colorsys is slow
        pixel = [round(255 * channel) for channel in colorsys.hsv_to_rgb(*(values[0, 0] / 255))]
        pixels = np.broadcast_to(np.array(pixel, dtype=np.uint8), (height, width, 3))
        return Image.frombytes("HSV", (width, height), values.tobytes()), pixels
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        values = rng.integers(0, 65536, (height, width)).astype(order)
        return Image.frombytes(mode, (width, height), values.tobytes()), grey((values / 257).round())
    if mode == "F":
        values = rng.random((height, width), dtype=np.float32)
        return Image.fromarray(values), grey((values * 255).round())
    if mode == "LAB":  # grey: lightness 0..100 in 0..255, and CIE's definition
        values = noise(width, height, 1, rng)[:, :, 0]
        image = Image.merge("LAB", [Image.fromarray(values), *[Image.new("L", (width, height), NEUTRAL)] * 2])
        lightness = values * (100 / 255)
        linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
        encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        return image, grey((255 * encoded).round())
    if mode == "I":  # 32 bits, of which nobody knows the largest value
        return Image.fromarray(rng.integers(0, 70_000, (height, width), dtype=np.int32)), None
    return Image.new(mode, (width, height)), None


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")
MODES += ("I;16", "I;16L", "I;16B", "I;16N")


class Readers:
    """The three places where images are read, each to what the model gets.

    Args:
        material: with a prompter and an image processor.
    """

    def __init__(self, material: Material) -> None:
        self.prompter = ImagePrompter.from_pretrained(material.root / "prompter")
        self.processor = material.processor
        self.transform = Transform(material.processor)

    def prompt(self, image: Any) -> Tensor:
        """Prompt an image in memory, or the array of pixels that it stands for."""
        return self.prompter.pixel_values(image)

    def process(self, image: Any) -> Tensor:
        """Process an array of 8-bit pixels (H, W, 3), or an image."""
        axes = {"input_data_format": "channels_last"} if isinstance(image, np.ndarray) else {}
        return self.processor(images=image, return_tensors="pt", **axes)["pixel_values"]

    def predict(self, file: Path) -> Tensor:
        """Read a file as predict.py does."""
        ((_, image),) = predict.read_images([file], True, [])
        return self.process(image)

    def train_from_file(self, file: Path) -> Tensor:
        """Read a file as training from a folder does."""
        return self.transform({"image": [{"path": str(file), "bytes": None}], "label": [0]})["pixel_values"]

    def train_from_bytes(self, file: Path) -> Tensor:
        """Read a file's content as training from parquet files does."""
        return self.transform({"image": [{"path": file.name, "bytes": file.read_bytes()}], "label": [0]})[
            "pixel_values"
        ]

    def of_files(self) -> dict[str, Callable[[Path], Tensor]]:
        """Return the readers of files."""
        return {
            "predict.py": self.predict,
            "training, files": self.train_from_file,
            "training, encoded images": self.train_from_bytes,
        }


def near(found: Tensor, expected: Tensor | None) -> bool:
    """Compare normalised pixels, to two levels of 255: conversions between colours round."""
    levels = 2 / 255 / 0.2
    return expected is not None and found.shape == expected.shape and bool((found - expected).abs().max() < levels)


def all_images(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Read images in memory and from files, whole and cut."""
    rng = np.random.default_rng(seed)
    readers, file = Readers(material), material.root / "image"
    sizes = [(mode, size) for mode in MODES for size in SIZES] + [("1", LARGEST), ("L", LARGEST)]
    random.Random(seed).shuffle(sizes)
    for mode, (width, height) in sizes[:cases]:
        image, pixels = image_of(mode, width, height, rng)
        wanted = None if pixels is None else readers.prompt(pixels)
        outcome = judge(lambda image=image: readers.prompt(image), lambda found, wanted=wanted: near(found, wanted))
        tally.add("ImagePrompter, images in memory", f"{mode}, {width} x {height}", outcome)
        for name in [name for name, modes in FORMATS.items() if name in ("PNG", "TIFF") and mode in modes]:
            image.save(file, name)
            wanted = readers.process(pixels)
            for row, read in readers.of_files().items():
                outcome = judge(lambda read=read: read(file), lambda found, wanted=wanted: near(found, wanted))
                tally.add(f"{row}, whole", f"{name}, {mode}, {width} x {height}", outcome)
    cut = [(name, mode, size) for name, modes in FORMATS.items() for mode in modes for size in ((40, 36), (300, 200))]
    random.Random(seed).shuffle(cut)
    for name, mode, (width, height) in cut[:cases]:
        image, pixels = image_of(mode, width, height, rng)
        buffer = io.BytesIO()
        image.save(buffer, name)
        content = buffer.getvalue()
        file.write_bytes(content)
        whole = {row: read(file) for row, read in readers.of_files().items()}
        for tenth in range(10):
            file.write_bytes(content[: len(content) * tenth // 10])
            for row, read in readers.of_files().items():
                wanted = whole[row]
                outcome = judge(lambda read=read: read(file), lambda found, wanted=wanted: equal(found, wanted))
                tally.add(f"{row}, cut", f"{name}, {mode}, {width} x {height}, {tenth} tenths", outcome)
