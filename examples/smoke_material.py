"""Model and data of the scripts' smoke modes: a tiny ViT, and a folder of red and blue images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor


def smoke_arguments(folder: Path) -> list[str]:
    """Make a tiny ViT and a folder of images, red and blue, and return the command line that trains on them."""
    random = np.random.default_rng(0)
    for name, colour in {"blue": (40, 40, 200), "red": (200, 40, 40)}.items():
        folder.joinpath("images", name).mkdir(parents=True)
        for index in range(40):
            noise = random.integers(-40, 40, size=(40, 36, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.jpg")
    torch.manual_seed(0)
    tiny = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ViTForImageClassification(tiny).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return [
        *("--model_name_or_path", str(folder / "vit"), "--dataset", str(folder / "images")),
        *("--output_dir", str(folder / "adapter"), "--augmentation", "flip", "--library_size", "8"),
        *("--num_virtual_tokens", "4", "--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--use_cpu"),
    ]
