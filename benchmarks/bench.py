"""What all benchmarks share: images as tensors, one training loop, a file of results that can be continued."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import far_domains
import image_data

from pgn_peft.nn.images import to_pixels
from pgn_peft.nn.preprocessing import Preprocessing, normalize
from pgn_peft.version import __version__

SHUFFLED = "+shuffled"
# End of a data set's name -> what is done to its images (N, C, H, W) of 8 bits.
CHANGES = {SHUFFLED: far_domains.shuffle_blocks, "+mixed": far_domains.mix_kinds}
# Digits are not the same mirrored, nor are blocks in a fixed order.
NOT_FLIPPED = ("digits", SHUFFLED)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Split:
    """Images (N, C, H, W) of 8-bit pixels, as the image processor leaves them before it normalises; labels (N,)."""

    pixels: Tensor
    labels: Tensor


@dataclass
class Material:
    """A data set, ready for one backbone: its splits by name, the names of its classes, and the backbone's scale."""

    splits: dict[str, Split]
    names: list[str]
    preprocessing: Preprocessing
    processor: Any

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that pixels in [0, 1] are normalised with."""
        return self.preprocessing.image_mean, self.preprocessing.image_std

    def normalized(self, pixels: Tensor) -> Tensor:
        """Turn 8-bit pixels (B, C, H, W) into what the backbone takes."""
        return normalize(pixels.float() / 255, *self.scale)


@cache  # many runs in a row use the same images
def load_material(
    source: str, model: str, side: int | None, max_train: int | None = None, max_evaluated: int | None = None
) -> Material:
    """Load a data set as tensors on the device.

    Args:
        source: "digits" (of scikit-learn), "counting" (made here), a folder, or the id of a data set; each also with
            one of `CHANGES` at its end.
        model: id or path of the backbone, whose image processor is used.
        side: of the images, in pixels; None: the processor's own.
        max_train: training images, the same share of each class; None: all. The choice does not depend on the seed.
        max_evaluated: likewise of the validation and of the test images.
    """
    processor = image_data.load_processor(model, side)
    preprocessing = Preprocessing.from_processor(processor)
    plain, plus, change = source.partition("+")
    if made := {"digits": digits, "counting": far_domains.counting}.get(plain):
        rows = made()
    else:
        rows = image_data.load_splits(image_data.DataArguments(plain), seed=0)
    splits = {}
    for name, split in rows.items():
        limit = max_train if name == "train" else max_evaluated
        if limit is not None and limit < len(split):
            split = split.train_test_split(train_size=limit, stratify_by_column="label", seed=0)["train"]
        pixels = torch.stack([preprocessing.apply(to_pixels(image, 3)) for image in split["image"]])
        if plus:
            pixels = CHANGES[plus + change](pixels)
        splits[name] = Split(pixels.to(DEVICE), torch.tensor(split["label"], device=DEVICE))
    return Material(splits, rows["train"].features["label"].names, preprocessing, processor)


def few_of_each_class(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Choose at most `shots` images of each class by a seed: indices into `labels` (N,), in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1]
    rank = torch.cat([torch.arange(int(count), device=labels.device) for count in counts])  # among those of its class
    few = torch.zeros_like(labels, dtype=torch.bool)
    few[by_class[rank < shots]] = True
    return order[few[order]]


def digits() -> datasets.DatasetDict:
    """Return scikit-learn's handwritten digits (8 x 8 pixels): 1,000 to train, 297 for validation, 500 to test."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 255 / 16).astype("uint8")
    train, rest = train_test_split(range(len(labels)), train_size=1000, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=297, stratify=labels[rest], random_state=0)
    features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": datasets.ClassLabel(10)})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": list(pixels[rows]), "label": labels[rows]}, features=features)
            for name, rows in {"train": train, "validation": validation, "test": test}.items()
        }
    )


def make_smoke(folder: str | Path, num_labels: int = 2) -> tuple[str, str]:
    """Make a folder of red and blue images and a tiny ViT with so many labels, for `--smoke`; return both paths."""
    data, model = Path(folder, "images"), str(Path(folder, "vit"))
    generator = np.random.default_rng(0)
    for name, colour in {"blue": (40, 40, 200), "red": (200, 40, 40)}.items():
        data.joinpath(name).mkdir(parents=True)
        for index in range(40):
            pixels = np.array(colour) + generator.integers(-40, 40, size=(40, 36, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(data / name / f"{index}.jpg")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tiny = ViTConfig(image_size=32, patch_size=8, num_labels=num_labels, **sizes)
    ViTForImageClassification(tiny).save_pretrained(model)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    return str(data), model


def load_backbone(path: str, side: int | None) -> Any:
    """Load a ViT whose position embeddings are resized if it is to see another image size.

    A DINOv2 resizes them by itself.
    """
    # On CPUs torch's fused attention is many times slower in bfloat16 than the plain one.
    attention = "sdpa" if DEVICE.type == "cuda" else "eager"
    if AutoConfig.from_pretrained(path).model_type == "dinov2":
        return Dinov2ForImageClassification.from_pretrained(path, attn_implementation=attention).eval().to(DEVICE)
    backbone = ViTForImageClassification.from_pretrained(path, attn_implementation=attention).eval()
    if side is None or side == backbone.config.image_size:
        return backbone.to(DEVICE)
    embeddings = backbone.vit.embeddings
    tokens = torch.zeros(1, (side // backbone.config.patch_size) ** 2 + 1, backbone.config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(tokens, side, side).detach()
    weights = backbone.state_dict() | {"vit.embeddings.position_embeddings": positions}
    backbone.config.image_size = side
    resized = ViTForImageClassification(backbone.config).eval()
    resized.load_state_dict(weights)
    return resized.to(DEVICE)


def autocast(precision: str) -> AbstractContextManager:
    """Return the context in which a model computes: "float32", or "bfloat16" by autocast."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def train(
    model: nn.Module,
    split: Split,
    groups: list[dict[str, Any]],
    *,
    epochs: int,
    batch_size: int,
    flip: bool,
    warm_up: float = 0.05,
    precision: str = "float32",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Train with AdamW, a linear warm-up and a cosine to zero.

    Args:
        model: pixels (B, C, H, W) in [0, 1] to logits.
        split: the training images.
        groups: what is trained, as for a torch optimizer.
        epochs: passes over the images; a last incomplete batch of each is left out.
        batch_size: images a step.
        flip: flip half of the images from left to right.
        warm_up: share of the steps in which the learning rate rises.
        precision: see `autocast`.
        loss: pixels (B, C, H, W) in [0, 1] and labels (B,) to a loss; None: cross-entropy of the model's logits.

    Returns:
        The mean loss of the last epoch.
    """
    if loss is None:

        def loss(batch: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(model(batch).float(), labels)

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps_per_epoch = len(split.labels) // batch_size
    steps = epochs * steps_per_epoch
    rising = max(1, round(warm_up * steps))
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for epoch in range(epochs):
        model.train()
        total = torch.zeros((), device=DEVICE)
        order = torch.randperm(len(split.labels)).to(DEVICE)
        for chosen in order[: steps_per_epoch * batch_size].view(-1, batch_size):
            batch = split.pixels[chosen].float() / 255
            if flip:
                mirrored = torch.rand(batch_size, 1, 1, 1, device=DEVICE) < 0.5
                batch = torch.where(mirrored, batch.flip(-1), batch)
            with autocast(precision):
                value = loss(batch, split.labels[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            rates.step()
            total += value.detach()
        print(f"  epoch {epoch + 1} of {epochs}, loss {total.item() / steps_per_epoch:.3f}", flush=True)
    return total.item() / steps_per_epoch


def predict(
    model: nn.Module | Callable[[Tensor], Tensor], pixels: Tensor, precision: str = "float32", batch_size: int = 100
) -> Tensor:
    """Return logits (N, M) for 8-bit pixels (N, C, H, W)."""
    if isinstance(model, nn.Module):
        model.eval()
    with torch.inference_mode(), autocast(precision):
        return torch.cat([model(batch.float() / 255).float() for batch in pixels.split(batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    return (logits.argmax(1) == labels).double().mean().item()


class Results:
    """A file of JSON lines, one a run. Several processes may add to it at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return map(json.loads, lines)

    def get(self, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a run with these settings; make it if it is not there."""
        found = next((row for row in self if row["settings"] == settings), None)
        if found is None:
            print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
            start = time.perf_counter()
            found = {"settings": settings} | run()
            found |= {"seconds": round(time.perf_counter() - start, 1), "environment": environment()}
            # Unbuffered: one write at the end of the file, so that lines of several processes do not mix.
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(found).encode() + b"\n")
        return found


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that a figure was measured with."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "pgn_peft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def markdown(rows: Iterable[Iterable[object]]) -> str:
    """Write a Markdown table; the first row has the names of the columns."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * (lines[0].count(" | ") + 1) + "|")
    return "\n".join(lines)
