"""Two domains far from photographs, made by a known rule: shapes to count, and images with shuffled blocks."""

from __future__ import annotations

import colorsys
import random

import datasets
import torch
from PIL import Image, ImageDraw
from torch import Tensor

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
