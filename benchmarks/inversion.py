"""Accuracy of prompt inversion: exact, and in the range of images that can be sent.

    python benchmarks/inversion.py --data path/to/eurosat --model path/to/deit-tiny-patch16-224

A latent adapter (one row of prompts, a head of its own) is trained at 112 px for 12 epochs on 1,000 images with seed
1; then its test accuracy as it was trained, inverted exactly, and inverted into the range of images and rounded to 8
bits, each beside the change of the logits. The server is called with tensors, since a pipeline would resize images
with appended rows. Each run is appended to a file of JSON lines. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import bench
import methods
import torch
from torch import Tensor, nn
from transformers import set_seed

from pgn_peft import ImagePrompter, make_prompter
from pgn_peft.nn.preprocessing import normalize


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train a latent adapter, and follow its logits and its accuracy from tokens to 8-bit pixels."""
    set_seed(1)
    material = bench.load_material(options.data, options.model, options.side, 1000, options.max_images)
    images = material.splits["test"]
    backbone = bench.load_backbone(options.model, options.side)
    fields = {"prompt_layout": "append", "num_virtual_tokens": None, "static_prompts": False}
    adapted, _ = methods.pgn(backbone, material, methods.Options(0.003, 0, 64, {}), **fields)
    model = adapted.model
    trained = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": 0.003}]
    bench.train(adapted, material.splits["train"], trained, epochs=options.epochs, batch_size=options.batch, flip=True)
    latent = bench.predict(adapted, images.pixels)
    with model.disable_adapter():
        features = bench.predict(Features(model.get_base_model().vit, material), images.pixels)
    exact = make_prompter(model, material.processor)
    valid = make_prompter(model, material.processor, in_range=True)
    vit = model.unload().vit
    forms = {
        "latent": latent,
        "exact": served(exact, vit, images.pixels),
        "8-bit": served(valid, vit, images.pixels),
        "no prompts": exact.classify(features),
    }
    rows = {
        form: {
            "accuracy": bench.accuracy(logits, images.labels),
            "agreement": bench.accuracy(logits, latent.argmax(1)),
            "largest change of a logit": (logits - latent).abs().max().item(),
        }
        for form, logits in forms.items()
    }
    for form, prompter in {"exact": exact, "8-bit": valid}.items():
        report = dataclasses.asdict(prompter.report)
        rows[form] |= {name: report[name] for name in ("condition_number", "mean_token_error", "largest_pixel")}
    return {"num_virtual_tokens": exact.layout.num_virtual_tokens, "images": len(images.labels), "forms": rows}


class Features(nn.Module):
    """Token 0 of the last hidden state, from pixels in [0, 1]."""

    def __init__(self, vit: nn.Module, material: bench.Material) -> None:
        super().__init__()
        self.vit, self.scale = vit, material.scale

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, D) features."""
        return self.vit(normalize(pixels, *self.scale)).last_hidden_state[:, 0]


@torch.inference_mode()
def served(prompter: ImagePrompter, vit: nn.Module, pixels: Tensor) -> Tensor:
    """Prompt images (N, C, H, W) uint8, call the stock model with tensors, and classify at the client."""
    logits = []
    for batch in pixels.cpu().split(50):
        pixel_values = prompter.pixel_values(batch).to(bench.DEVICE)
        features = vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        logits.append(prompter.classify(features))
    return torch.cat(logits)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Write a line for each form: shares with three decimals, other numbers with three digits."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        formats = {column: ".3f" if column in ("accuracy", "agreement") else ".3g" for column in columns}
        lines.append([name, *(format(row[column], formats[column]) if column in row else "-" for column in columns)])
    return bench.markdown(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train, validation and test.parquet, or any image data set")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--results", default="outputs/inversion.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--max_images", type=int, default=1000, help="test images, at most")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            options.data, options.model = bench.make_smoke(folder)
            options.results, options.side, options.epochs, options.batch = f"{folder}/results.jsonl", 32, 2, 8
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        settings = {name: getattr(options, name) for name in ("side", "epochs", "batch", "max_images")}
        settings |= {"data": Path(options.data).name, "model": Path(options.model).name}
        print(table(bench.Results(options.results).get(settings, lambda: measure(options))["forms"]))


if __name__ == "__main__":
    main()
