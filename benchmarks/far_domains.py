"""Images made by a known rule: shapes to count, shuffled blocks, and four kinds of images mixed in one set."""

from __future__ import annotations

import colorsys
import random

import datasets
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

SIDE = 64
LARGEST_NUMBER = 8
KINDS = ("ellipse", "rectangle", "triangle")


def draw_shapes(number: int, generator: random.Random) -> Image.Image:
    """Draw so many shapes that do not touch, of random kinds, sizes, places and bright colours, on dark grey."""
    image = Image.new("RGB", (SIDE, SIDE), (generator.randrange(64),) * 3)
    brush, placed = ImageDraw.Draw(image), []
    while len(placed) < number:
        size = generator.randint(7, 15)
        x, y = (generator.randint(1, SIDE - size - 2) for _ in range(2))
        if any(abs(x - u) < max(size, other) + 2 and abs(y - v) < max(size, other) + 2 for u, v, other in placed):
            continue
        placed.append((x, y, size))
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(generator.random(), 0.8, 1.0))
        kind = generator.choice(KINDS)
        if kind == "triangle":
            brush.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
        else:
            getattr(brush, kind)((x, y, x + size, y + size), fill=colour)
    return image


def counting() -> datasets.DatasetDict:
    """Return images of 1 to 8 shapes, whose number is the class: 1,000 to train, 400 for validation, 800 to test."""
    features = datasets.Features(
        {
            "image": datasets.Image(mode="RGB"),
            "label": datasets.ClassLabel(names=[str(number) for number in range(1, LARGEST_NUMBER + 1)]),
        }
    )
    splits = {}
    for seed, (name, size) in enumerate({"train": 1000, "validation": 400, "test": 800}.items()):
        generator = random.Random(seed)
        labels = [index % LARGEST_NUMBER for index in range(size)]
        images = [draw_shapes(label + 1, generator) for label in labels]
        splits[name] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return datasets.DatasetDict(splits)


def shuffle_blocks(pixels: Tensor, blocks: int = 8) -> Tensor:
    """Cut images into blocks and put these into another order, the same for all images.

    Args:
        pixels: (N, C, H, W); H and W must be multiples of `blocks`.
        blocks: in each direction. At 112 px a block has 14 px, and those of one patch of 16 px come from several.

    Returns:
        (N, C, H, W).
    """
    count, channels, height, width = pixels.shape
    order = torch.randperm(blocks * blocks, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    cut = pixels.view(count, channels, blocks, height // blocks, blocks, width // blocks)
    listed = cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[order]  # (blocks * blocks, N, C, h, w)
    return listed.unflatten(0, (blocks, blocks)).permute(2, 3, 0, 4, 1, 5).reshape(pixels.shape)


def mix_kinds(pixels: Tensor) -> Tensor:
    """Change three of every four images, each in another way, as if they came from four cameras.

    Args:
        pixels: (N, C, H, W) of 8 bits; H and W must be multiples of 8.

    Returns:
        (N, C, H, W) of 8 bits: in turn as they are, at an eighth of the resolution, with noise of 40 levels, and as
        dark negatives.
    """
    mixed = pixels.clone()
    coarse = F.avg_pool2d(pixels[1::4].float(), 8)
    mixed[1::4] = F.interpolate(coarse, scale_factor=8, mode="nearest").round().to(pixels.dtype)
    noise = torch.randn(pixels[2::4].shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    mixed[2::4] = (pixels[2::4] + 40 * noise).round().clamp(0, 255).to(pixels.dtype)
    mixed[3::4] = (255 - pixels[3::4]) // 2
    return mixed
