"""Accuracy of prompt inversion: exact, and in the range of images that can be sent.

    python benchmarks/inversion.py exact --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224
    python benchmarks/inversion.py curve --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224

`exact`: for the model and for randomly initialised ViT-B/32, ViT-B/16 and ViT-S/16 of full size, the logits of the
stock model, given inverted prompts as pixels, beside those of the latent model: 1,000 real images at 224 px, one row
of prompts, a random generator and a library of scale 0.3. float32.

`curve`: a latent adapter (one row of prompts, a head of its own) is trained at 112 px for 12 epochs on 1,000 images
with seed 1; then its test accuracy as it was trained, inverted exactly, inverted into the range of images, and as
8-bit PNGs. The server is called with tensors, since a pipeline would resize images with appended rows.

Each row is appended to a file of JSON lines. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import image_data
from image_data import smoke_arguments
from methods import Adapted

from pgn_peft import ImagePrompter, PGNConfig, make_prompter
from pgn_peft.nn.layout import compose
from pgn_peft.nn.preprocessing import normalize

# name -> fields of ViTConfig, and prompts in one row at 224 px
SHAPES = {
    "ViT-B/32": ({"patch_size": 32}, 7),
    "ViT-B/16": ({"patch_size": 16}, 14),
    "ViT-S/16": ({"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}, 14),
}


NOT_SHOWN = ("pgn_peft", "torch", "transformers", "peft", "device", "threads", "seconds")


def exact(options) -> list[dict]:
    """Compare stock models with latent ones."""
    return [compare(name, options) for name in options.shapes or ("the model", *SHAPES)]


def compare(name: str, options) -> dict:
    """Compare one stock model, given pixels, with the latent model, on the same images."""
    set_seed(0)
    processor = image_data.load_processor(options.model, None)
    if name == "the model":
        stock = ViTForImageClassification.from_pretrained(options.model)
        prompts = stock.config.image_size // stock.config.patch_size
    else:
        fields, prompts = SHAPES[name]
        stock = ViTForImageClassification(ViTConfig(num_labels=1000, **fields))
    weights = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    splits = image_data.load_splits(image_data.DataArguments(options.data), seed=0)
    images = splits["validation"]["image"][: options.max_test_samples]
    config = PGNConfig(
        num_virtual_tokens=prompts,
        library_size=64,
        generator_image_size=None,
        initializer_range=0.3,
        initial_logit_std=4,
        head="frozen",
    )
    model = get_peft_model(stock, config).eval()
    prompter = make_prompter(model, processor)
    unmodified = ViTForImageClassification(stock.config).eval()
    unmodified.load_state_dict(weights)
    largest = effect = 0.0
    equal = 0
    for start in range(0, len(images), 50):
        batch = images[start : start + 50]
        with torch.inference_mode():
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
            latent = model(pixel_values).logits
            inverted = unmodified(prompter.pixel_values(batch), interpolate_pos_encoding=True).logits
            if start == 0:
                effect = (unmodified(pixel_values).logits - latent).abs().max().item()
        largest = max(largest, (inverted - latent).abs().max().item())
        equal += (inverted.argmax(1) == latent.argmax(1)).sum().item()
        print(f"  {name}: {start + len(batch)} of {len(images)}, largest difference {largest:.1e}", flush=True)
    return {
        "shape": name,
        "images": len(images),
        "largest_logit_difference": largest,
        "equal_top_1": equal / len(images),
        "largest_effect_of_prompts_on_logits": effect,
    } | dataclasses.asdict(prompter.report)


def curve(options) -> list[dict]:
    """Train a latent adapter, and follow its accuracy from tokens to PNGs."""
    set_seed(1)
    material = bench.load_material(
        options.data, options.model, options.side, options.max_train_samples, options.max_test_samples
    )
    processor, images = material.processor, material.splits["test"]
    config = PGNConfig(
        prompt_layout="append",
        library_size=options.library_size,
        generator_image_size=options.generator_image_size,
        initial_logit_std=4,
        id2label=dict(enumerate(material.names)),
    )
    model = get_peft_model(bench.load_backbone(options.model, options.side), config)
    trained = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": 0.003}]
    adapted = Adapted(model, material)
    bench.train(adapted, material.splits["train"], trained, epochs=options.epochs, batch_size=options.batch, flip=True)
    latent = bench.predict(adapted, images.pixels)
    with model.disable_adapter():
        features = bench.predict(Features(model.get_base_model().vit, material), images.pixels)
    exact_prompter = make_prompter(model, processor)
    prompter = make_prompter(model, processor, in_range=True)
    stock = model.unload()
    forms = {
        "latent": latent,
        "no prompts": exact_prompter.classify(features),
        "exact": served(exact_prompter, stock, images.pixels, "float"),
        "in range": served(prompter, stock, images.pixels, "float"),
        "8-bit PNG": served(prompter, stock, images.pixels, "8-bit"),
    }
    exact_prompter.image_offset = None  # what the undone shift of the position embeddings is worth
    forms["exact, image's own shift left"] = served(exact_prompter, stock, images.pixels, "float")
    reports = {"exact": exact_prompter.report, "in range": prompter.report, "8-bit PNG": prompter.report}
    return [
        {
            "form": form,
            "data": Path(options.data).name,
            "side": options.side,
            "epochs": options.epochs,
            "num_virtual_tokens": prompter.layout.num_virtual_tokens,
            "images": len(images.labels),
            "accuracy": bench.accuracy(logits, images.labels),
            "agreement": bench.accuracy(logits, latent.argmax(1)),
        }
        | (dataclasses.asdict(reports[form]) if form in reports else {})
        for form, logits in forms.items()
    ]


class Features(nn.Module):
    """Token 0 of the last hidden state, from pixels in [0, 1]."""

    def __init__(self, vit: nn.Module, material: bench.Material) -> None:
        super().__init__()
        self.vit, self.scale = vit, material.scale

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, D) features."""
        return self.vit(normalize(pixels, *self.scale)).last_hidden_state[:, 0]


def served(prompter: ImagePrompter, stock: nn.Module, pixels: Tensor, precision: str) -> Tensor:
    """Prompt images (N, C, H, W) uint8, call the stock model with tensors, and classify at the client."""
    logits = []
    with torch.inference_mode():
        for batch in pixels.split(50):
            batch = batch.float() / 255
            prompted = compose(
                batch, prompter.patches(batch), prompter.layout, prompter.image_offset, valid=precision == "8-bit"
            )
            preprocessing = prompter.preprocessing
            pixel_values = normalize(prompted, preprocessing.image_mean, preprocessing.image_std)
            features = stock.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            logits.append(prompter.classify(features))
    return torch.cat(logits)


def shown(name: str, value: object) -> str:
    """Format a figure: shares with three decimals, other numbers with three digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if name in ("accuracy", "agreement", "equal_top_1") else f"{value:.3g}"


def table(rows: list[dict]) -> str:
    """Make a Markdown table."""
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_SHOWN)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(shown(name, row.get(name, "-")) for name in names) + " |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("exact", "curve"), default="curve")
    parser.add_argument("--data", help="folder with train, validation and test.parquet, or any image data set")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--results", default="outputs/inversion.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--shapes", nargs="+", choices=("the model", *SHAPES), help="for exact: only these")
    parser.add_argument("--side", type=int, default=112, help="for the curve: of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--generator_image_size", type=int, default=64)
    parser.add_argument("--max_train_samples", type=int, default=1000)
    parser.add_argument("--max_test_samples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = f"{folder}/images", f"{folder}/vit"
            options.results, options.shapes = f"{folder}/results.jsonl", ["the model"]
            options.side, options.epochs, options.batch, options.library_size = 32, 2, 8, 8
            print(table(exact(options)))
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        Path(options.results).parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        rows = (exact if options.what == "exact" else curve)(options)
        with Path(options.results).open("a", encoding="utf-8") as file:
            for row in rows:
                row |= {"seconds": round(time.perf_counter() - start, 1)} | bench.environment()
                file.write(json.dumps(row) + "\n")
        print(table(rows))


if __name__ == "__main__":
    main()
