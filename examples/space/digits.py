"""Scikit-learn's digits, the same digits in a new domain, and a tiny Vision Transformer trained on the former."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from image_data import UprightImage
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from pgn_peft.nn.images import to_8_bit, to_images

SIDE = 16
SEED = 0
NAMES = [str(digit) for digit in range(10)]


class Digits:
    """The original digits and those in the new domain, split into train, validation and test (60 / 20 / 20).

    `plain` and `turned` hold, by split, images (B, 3, 16, 16) normalised to [-1, 1] and labels (B,).
    """

    def __init__(self) -> None:
        source = load_digits()
        images = torch.tensor(source.images, dtype=torch.float32) / 16  # (B, 8, 8) in [0, 1]
        images = nn.functional.interpolate(images[:, None], size=SIDE, mode="bilinear")  # (B, 1, 16, 16)
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(SEED))
        turned = (1 - images.rot90(dims=(2, 3))) * (0.6 + 0.4 * noise)
        labels = torch.tensor(source.target)
        indices = torch.arange(len(labels))
        train, rest = train_test_split(indices, test_size=0.4, stratify=labels, random_state=SEED)
        validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=SEED)
        split = {"train": train, "validation": validation, "test": test}
        self.plain = {name: (self._normalise(images[chosen]), labels[chosen]) for name, chosen in split.items()}
        self.turned = {name: (self._normalise(turned[chosen]), labels[chosen]) for name, chosen in split.items()}

    @staticmethod
    def _normalise(images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1) * 2 - 1

    def files(self, split: str) -> list[tuple[Image.Image, int]]:
        """Return the images of a split in the new domain as Pillow images, with their labels."""
        images, labels = self.turned[split]
        return list(zip(to_images(to_8_bit((images + 1) / 2), Image.Image), labels.tolist(), strict=True))

    def rows(self) -> DatasetDict:
        """Return training and validation images of the new domain as `image_data.load_splits` returns images."""
        features = Features({"image": UprightImage(), "label": ClassLabel(names=NAMES)})
        splits = {}
        for split in ("train", "validation"):
            images, labels = zip(*self.files(split), strict=True)
            splits[split] = Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)
        return DatasetDict(splits)


def image_processor() -> ViTImageProcessor:
    """Return the tiny model's image processor."""
    size = {"height": SIDE, "width": SIDE}
    return ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def train(
    model: nn.Module,
    parameters: Iterable,
    data: tuple[Tensor, Tensor],
    rate: float,
    epochs: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train with AdamW, a one-cycle learning rate and batches of 64."""
    images, labels = data
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    steps = epochs * -(-len(labels) // 64)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    shuffle = torch.Generator().manual_seed(SEED)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(64):
            loss = model(images[batch], labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch()
    model.eval()


def make_base(digits: Digits, folder: Path, epochs: int, after_epoch: Callable[[], None] = lambda: None) -> None:
    """Train a tiny ViT on the original digits, and save it with its image processor."""
    set_seed(SEED)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        id2label=dict(enumerate(NAMES)),
    )
    model = ViTForImageClassification(config)
    train(model, model.parameters(), digits.plain["train"], 1e-3, epochs, after_epoch)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
