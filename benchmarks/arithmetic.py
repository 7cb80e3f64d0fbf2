"""What 64 GPUs need for a billion images, and one for a backbone of 22 billion parameters: arithmetic, not measured.

    python benchmarks/arithmetic.py

Operations are counted by torch on a ViT-B/16 without memory: forward through all, backward to activations in the
frozen backbone, and to weights in the adapter only. The assumptions stand in the first lines of the functions.
`--smoke` prints the same.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from pgn_peft import PGNConfig


def calculate() -> dict[str, float]:
    """Return each quantity by its name."""
    gpus, machines, images = 64, 8, 1e9
    peak, utilisation = 989e12, 0.4  # H100, dense bfloat16; what a plain ViT reaches of it
    batch = 256  # images on a GPU, a step
    bandwidth, latency = 25e9, 10e-6  # bytes/s between neighbours in a ring; seconds a hop
    jpeg = 110e3  # bytes, an ImageNet photograph of about 500 x 375 pixels
    decoded = 220  # images/s a core, decoded, augmented, resized; of 256 px: docs/costs.md

    with torch.device("meta"):  # shapes only
        vit = ViTForImageClassification(ViTConfig())
        model = get_peft_model(vit, PGNConfig(num_virtual_tokens=16, num_labels=1000))
        pixel_values = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model.to("meta").train()(pixel_values=pixel_values).logits.sum().backward()
    operations = counter.get_total_flops()
    gradients = 4 * model.get_nb_trainable_parameters()[0]  # float32

    rate = utilisation * peak / operations
    step = batch / rate
    all_reduce = 2 * (gpus - 1) / gpus * gradients / bandwidth + 2 * (gpus - 1) * latency
    return {
        "billions of operations an image": operations / 1e9,
        "images/s a GPU": rate,
        "hours an epoch": images / (gpus * rate) / 3600,
        "milliseconds a step": 1000 * step,
        "milliseconds of all-reduce": 1000 * all_reduce,
        "share of a step, if nothing overlaps": all_reduce / (step + all_reduce),
        "GB/s of JPEG a machine": gpus / machines * rate * jpeg / 1e9,
        "cores a machine for decoding": gpus / machines * rate / decoded,
    }


def calculate_largest() -> dict[str, float]:
    """Return each quantity by its name, for ViT-22B's sizes (arXiv:2302.05442) in the form of a plain ViT."""
    peak, utilisation = 989e12, 0.4  # H100, dense bfloat16; what a plain ViT reaches of it
    batch = 32
    four_bits = 0.5 + 4 / 64  # bytes a weight: 4 bits, and a float32 scale for each 64
    sizes = {"hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48, "intermediate_size": 24576}
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(**sizes, patch_size=14))
        backbone = sum(parameter.numel() for parameter in vit.parameters())
        model = get_peft_model(vit, PGNConfig(num_virtual_tokens=16, num_labels=1000))
        pixel_values = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model.to("meta").train()(pixel_values=pixel_values).logits.sum().backward()
    adapter = model.get_nb_trainable_parameters()[0]
    tokens = (224 // 14) ** 2 + 1 + 16
    kept = batch * tokens * sizes["hidden_size"] * 2 * sizes["num_hidden_layers"]  # bfloat16, one for each layer
    return {
        "billions of parameters": backbone / 1e9,
        "millions in an adapter": adapter / 1e6,
        "MB of an adapter's file": 4 * adapter / 1e6,
        "GB of weights in bfloat16": 2 * backbone / 1e9,
        "GB of weights in 4 bits": four_bits * backbone / 1e9,
        "GB of gradients and Adam's state": 12 * adapter / 1e9,
        "GB of the same for all weights": 12 * backbone / 1e9,
        "GB kept for 32 images, checkpointed": kept / 1e9,
        "images/s a GPU in training": utilisation * peak / (counter.get_total_flops() * 4 / 3),  # forward twice
        "adapters in the memory of one copy": 2 * backbone / (4 * adapter),
    }


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the same")
    parser.parse_args(command_line)
    for name, value in calculate().items():
        print(f"{name:40}{value:10,.3g}")
    print()
    for name, value in calculate_largest().items():
        print(f"{name:40}{value:10,.3g}")


if __name__ == "__main__":
    main()
