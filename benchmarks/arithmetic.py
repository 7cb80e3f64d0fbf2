"""What 64 GPUs would need for a billion images: arithmetic from assumed rates, nothing measured.

    python benchmarks/arithmetic.py

Operations are counted by torch on a ViT-B/16 without memory: forward through all, backward to activations in the
frozen backbone, and to weights in the adapter only. The assumptions stand in the first lines of `calculate`.
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


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the same")
    parser.parse_args(command_line)
    for name, value in calculate().items():
        print(f"{name:40}{value:10,.3g}")


if __name__ == "__main__":
    main()
