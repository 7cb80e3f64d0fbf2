"""Vision Transformers of all sizes and images of noise, to measure time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bench import DEVICE, Material, Split
from transformers import ViTConfig

from pgn_peft.nn.preprocessing import Preprocessing

NUM_LABELS = 10


@dataclass(frozen=True)
class Size:
    """A Vision Transformer's width D, layers, heads, width of the MLP, and sides of a patch and an image in pixels."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    image_size: int = 224

    def config(self, **more: Any) -> ViTConfig:
        """Return the config of a ViT of this size; `more` are further fields of it, or others for these."""
        fields = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "patch_size": self.patch_size,
            "image_size": self.image_size,
            "num_labels": NUM_LABELS,
        }
        return ViTConfig(**(fields | more))


# Ti, H, g, G and e as in the papers (Touvron 2021, Dosovitskiy 2021, Zhai 2022, Chen 2023); those named by their
# parameters are steps between and beyond.
SIZES = {
    "tiny": Size(32, 2, 2, 64, 8, 32),
    "Ti/16": Size(192, 12, 3, 768, 16),
    "S/16": Size(384, 12, 6, 1536, 16),
    "S/14": Size(384, 12, 6, 1536, 14),
    "B/32": Size(768, 12, 12, 3072, 32),
    "B/16": Size(768, 12, 12, 3072, 16),
    "L/16": Size(1024, 24, 16, 4096, 16),
    "H/14": Size(1280, 32, 16, 5120, 14),
    "g/14": Size(1408, 40, 16, 6144, 14),
    "G/14": Size(1664, 48, 16, 8192, 14),
    "2.6B/14": Size(2048, 52, 16, 8192, 14),
    "e/14": Size(1792, 56, 16, 15360, 14),
    "5.2B/14": Size(2560, 66, 20, 10240, 14),
    "6.7B/14": Size(4096, 40, 32, 12288, 14),
    "8.7B/14": Size(4096, 43, 32, 16384, 14),
    "10B/14": Size(4096, 50, 32, 16384, 14),
    "12B/14": Size(4608, 47, 36, 18432, 14),
}


def random_material(side: int, count: int) -> Material:
    """Make so many images of noise, with labels in turn, as a data set's training images."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=DEVICE)
    split = Split(pixels, torch.arange(count, device=DEVICE) % NUM_LABELS)
    names = [f"class {index}" for index in range(NUM_LABELS)]
    return Material({"train": split}, names, Preprocessing((0.5,) * 3, (0.5,) * 3, (side, side)), None)
