"""Pictures of flowers, drawn by rule, by day and at night, and a tiny Vision Transformer trained on those by day."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from image_data import UprightImage
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from pgn_peft.nn.images import to_8_bit, to_images

SIDE = 64
SEED = 0
BATCH = 32
SPLITS = {"train": 1080, "validation": 240, "test": 240}
Y, X = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")  # the middle is (0, 0), the top is y = -1

WHITE, YELLOW, ORANGE, RED = (0.96, 0.95, 0.92), (0.98, 0.82, 0.12), (0.97, 0.5, 0.1), (0.85, 0.1, 0.1)
PINK, VIOLET, GREEN, BLACK = (0.93, 0.5, 0.65), (0.55, 0.35, 0.75), (0.25, 0.45, 0.15), (0.1, 0.08, 0.1)


class Ring(NamedTuple):
    """Equal petals around a point of the stem; a leaf is a ring of one. The unit is the radius of the flower."""

    number: int
    width: float  # half of a petal's
    length: float = 1
    widest: float = 0  # where a petal is widest: 0 is its middle, 1 its tip, -1 its base
    turn: float = 0  # angle of the first petal: 0 is up, pi / 2 right
    up: float = 0  # from the middle of the flower to the point
    colour: tuple[float, ...] = ()  # if it is not the flower's


STEM = [
    Ring(1, 0.07, 4, turn=math.pi, colour=GREEN),
    *(Ring(1, 0.2, 0.9, 0, turn, -1.5, GREEN) for turn in (-0.9, 0.9)),
]
KINDS = {  # colours, and rings from back to front
    "buttercup": ([YELLOW, WHITE, VIOLET], [Ring(5, 0.38, 1, 0.4), Ring(9, 0.2, 0.22, colour=ORANGE)]),
    "daisy": ([WHITE, PINK, YELLOW], [Ring(14, 0.15, 1, 0.3), Ring(9, 0.2, 0.33, colour=ORANGE)]),
    "lavender": ([VIOLET, PINK, WHITE], [Ring(3, 0.16, 0.34 - n / 50, 0, 1.3 * n, n / 5 - 0.7) for n in range(8)]),
    "lily": ([WHITE, ORANGE, PINK], [Ring(3, 0.22, 1, -0.2, turn) for turn in (math.pi, 0)]),
    "poppy": (
        [RED, ORANGE, PINK],
        [*(Ring(2, 0.7, 1, 0.4, turn) for turn in (1.57, 0)), Ring(9, 0.2, 0.22, colour=BLACK)],
    ),
    "tulip": ([RED, YELLOW, PINK, VIOLET], [Ring(1, 0.4, 1.35, -0.3, turn, -0.5) for turn in (-0.42, 0.42, 0)]),
}
NAMES = list(KINDS)


def draw(name: str, number: int, generator: torch.Generator) -> Tensor:
    """Draw flowers of a kind by day, (B, 3, H, W) in [0, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *(shape or (1, 1, 1)), generator=generator)

    colours, rings = KINDS[name]
    # Out of focus: a meadow, with the sky above in most pictures.
    meadow = uniform(0.5, 1.3, 3, 6, 6) * torch.tensor(GREEN)[:, None, None]
    sky = uniform(0.8, 1, 3, 1, 1) * torch.tensor((0.65, 0.8, 0.98))[:, None, None]
    far = torch.where(torch.arange(6)[:, None] < uniform(-2, 5), sky, meadow)
    canvas = nn.functional.interpolate(far, SIDE, mode="bicubic")
    colour = torch.tensor(colours)[torch.randint(len(colours), [number], generator=generator)][..., None, None]
    colour = colour + uniform(-0.08, 0.08, 3, 1, 1)
    radius, lean, x, y = uniform(0.6, 0.75), uniform(-0.2, 0.2), uniform(-0.1, 0.1), uniform(-0.25, -0.05)
    for ring in STEM + rings:
        place = (x + ring.up * radius * lean.sin(), y - ring.up * radius * lean.cos())
        own = torch.tensor(ring.colour)[:, None, None] if ring.colour else colour
        paint(canvas, ring, place, lean + uniform(-0.1, 0.1), radius, own * uniform(0.85, 1.1))
    light = 1 + 0.15 * (X * uniform(-1, 1) + Y * uniform(-1, 0))
    return canvas * light + 0.02 * torch.randn(canvas.shape, generator=generator)


def paint(
    canvas: Tensor, ring: Ring, place: tuple[Tensor, Tensor], lean: Tensor, radius: Tensor, colour: Tensor
) -> None:
    """Paint a ring onto each picture, in place, with a soft shadow around it."""
    x, y = X - place[0], Y - place[1]
    angle = torch.atan2(x, -y) - lean - ring.turn
    angle -= (angle * ring.number / math.tau).round() * (
        math.tau / ring.number
    )  # from the middle of the nearest petal
    distance = (x**2 + y**2).sqrt() / radius
    along, across = distance * angle.cos() / ring.length, distance * angle.sin() / ring.width
    inside = along.clamp(0, 1)
    spot = inside + ring.widest * inside * (inside - 1)
    outline = (4 * spot * (1 - spot)) ** 0.75
    edge = torch.minimum(outline - across.abs(), 8 * torch.minimum(along, 1 - along))
    edge *= ring.width * radius * SIDE / 2  # roughly the distance to the edge, in pixels
    canvas *= 1 - 0.3 * (edge / 6 + 0.7).clamp(0, 1)
    texture = 0.65 + 0.35 * inside + 0.12 * across + 0.04 * (12 * across).cos()
    canvas += (0.7 * edge + 0.5).clamp(0, 1) * (colour * texture - canvas)


class Flowers:
    """Flowers by day and the same ones at night, split into train, validation and test.

    `day` and `night` hold, by split, 8-bit images (B, 3, 64, 64) and labels (B,).
    """

    def __init__(self) -> None:
        self.day: dict[str, tuple[Tensor, Tensor]] = {}
        self.night: dict[str, tuple[Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(SEED)
        for split, number in SPLITS.items():
            kinds = [draw(name, number // len(NAMES), generator) for name in NAMES]
            images, labels = torch.stack(kinds, dim=1).flatten(0, 1), torch.arange(number) % len(NAMES)
            # What a camera takes at night is dark, blue, of little colour, and noisy.
            dark = (images + images.mean(dim=1, keepdim=True)) / 2 * torch.tensor((0.45, 0.52, 0.72))[:, None, None]
            dark += 0.05 * torch.randn(images.shape, generator=generator)
            self.day[split], self.night[split] = (to_8_bit(images), labels), (to_8_bit(dark), labels)

    def files(self, split: str) -> list[tuple[Image.Image, int]]:
        """Return the images of a split at night as Pillow images, with their labels."""
        images, labels = self.night[split]
        return list(zip(to_images(images, Image.Image), labels.tolist(), strict=True))

    def rows(self) -> DatasetDict:
        """Return training and validation images at night as `image_data.load_splits` returns images."""
        features = Features({"image": UprightImage(), "label": ClassLabel(names=NAMES)})
        splits = {}
        for split in ("train", "validation"):
            images, labels = zip(*self.files(split), strict=True)
            splits[split] = Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)
        return DatasetDict(splits)


def image_processor() -> ViTImageProcessor:
    """Return the tiny model's image processor."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def normalise(images: Tensor) -> Tensor:
    """Convert 8-bit images to pixel values as `image_processor` does."""
    return images / 127.5 - 1


def train(
    model: nn.Module, parameters: Iterable, data: tuple[Tensor, Tensor], rate: float, epochs: int, name: str
) -> None:
    """Train with AdamW, a one-cycle learning rate, batches of 32, and a progress bar of this name."""
    images, labels = data
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    steps = epochs * -(-len(labels) // BATCH)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    shuffle = torch.Generator().manual_seed(SEED)
    model.train()
    for _ in tqdm(range(epochs), desc=name, leave=False, disable=None):
        for batch in torch.randperm(len(labels), generator=shuffle).split(BATCH):
            loss = model(normalise(images[batch]), labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def make_base(flowers: Flowers, folder: Path, epochs: int) -> None:
    """Train a tiny ViT on the flowers by day, and save it with its image processor."""
    set_seed(SEED)
    size = {"image_size": SIDE, "patch_size": 16, "hidden_size": 64, "intermediate_size": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "id2label": dict(enumerate(NAMES))}
    model = ViTForImageClassification(ViTConfig(**size, **layers))
    train(model, model.parameters(), flowers.day["train"], 1e-3, epochs, "the base, on flowers by day")
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
