"""Methods that adapt a model through its input image alone, compared on 8-bit PNGs.

    python benchmarks/input_only.py --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224

The server is a stock `ViTForImageClassification` behind its own image processor, with its own head: the task's classes
are read off its answers by a label mapping found by frequency on the training images (the same for all methods).

- mapping: the images as they are;
- border: visual prompting (Bahng et al. 2022): a learned border added to the image, 30 pixels wide at 224, 15 at 112;
- static: learned patches around the shrunk image, the same for all images;
- pgn: patches mixed for each image.

`--head trained` trains a linear head as well (for a server that accepts a head), with the linear probe in place of the
mapping, and latent prompts ("latent-static", "latent-pgn") to compare with.

All methods see the same images, flips, batches, epochs and schedule. Each one's learning rate is chosen from a grid of
equal size by the accuracy on validation with seed 0; the report is that of other seeds, on test images seen once,
after the last epoch. Figures are those of the PNGs: encoded, decoded, and through the server's processor; and of JPEGs
of quality 90, for the loss that they cause. Every run is appended to a file of JSON lines, and one that is in it is
not repeated. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
from methods import Adapted, Border, new_head
from smoke_material import smoke_arguments

from pgn_peft import PGNConfig, frequency_mapping, make_prompter
from pgn_peft.nn.images import to_8_bit, to_images, to_pixels
from pgn_peft.training import start_library_from_images

METHODS = {
    "frozen": ("mapping", "border", "static", "pgn"),
    "trained": ("linear", "border", "static", "pgn", "latent-static", "latent-pgn"),
}
# Learning rates to choose from, as many for each method: of a border, a library or a linear probe. A generator, and a
# head beside prompts, learn at a rate of their own.
GRID = (0.03, 0.1)
GRIDS = {name: (0.003, 0.01) for name in ("linear", "latent-static", "latent-pgn")}
OTHER_LEARNING_RATE = 0.003


class Mapped(nn.Module):
    """The server's logits, read through a label mapping."""

    def __init__(self, server: nn.Module, mapping: list[int] | None) -> None:
        super().__init__()
        self.server, self.mapping = server, mapping

    def forward(self, pixel_values: Tensor):
        """Answer normalised pixels with the model's outputs, the logits mapped."""
        outputs = self.server(pixel_values)
        if self.mapping is not None:
            outputs.logits = outputs.logits[:, self.mapping]
        return outputs


def through(encoding: str, images: list[Image.Image], processor) -> Tensor:
    """Encode images, decode them, and run the server's processor."""
    decoded = []
    for image in images:
        file = io.BytesIO()
        image.save(file, encoding, **({"quality": 90} if encoding == "JPEG" else {}))
        decoded.append(Image.open(file))
    return processor(images=decoded, return_tensors="pt")["pixel_values"]


def build(method: str, server: nn.Module, material: bench.Material, mapping: list[int] | None, options) -> nn.Module:
    """Make the model that a method trains."""
    server.requires_grad_(False)
    if method in ("mapping", "linear", "border"):
        if mapping is None:
            new_head(server, len(material.names))
        adapted = Adapted(Mapped(server, mapping), material)
        return Border(adapted, options.side).to(bench.DEVICE) if method == "border" else adapted
    kind = method.removeprefix("latent-")
    common = {
        "generator": "static" if kind == "static" else "resnet10",
        "library_size": options.library_size,
        "generator_image_size": options.generator_image_size,
        "initial_logit_std": 4.0,
        "head": "trained" if mapping is None else "frozen",
        "label_mapping": mapping,
        "id2label": dict(enumerate(material.names)),
    }
    if method.startswith("latent-"):
        return Adapted(get_peft_model(server, PGNConfig(**common)), material)
    mean, std = map(list, material.scale)
    pixel = PGNConfig(
        prompt_space="pixel", num_virtual_tokens=options.num_virtual_tokens, image_mean=mean, image_std=std, **common
    )
    model = get_peft_model(server, pixel)
    start_library_from_images(model, material.splits["train"].pixels[:500].float() / 255, seed=options.seed)
    return Adapted(model, material)


def groups(model: nn.Module, learning_rate: float) -> list[dict]:
    """Sort what is trained: the library, the border or a linear probe at the searched rate, the rest at its own."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            searched = "pgn_library" in name or name == "border" or name.startswith("model.server")
            found.setdefault(learning_rate if searched else OTHER_LEARNING_RATE, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in found.items()]


def run(method: str, learning_rate: float | None, seed: int, report: bool, options) -> dict:
    """Train one model; evaluate it as trained and through PNGs, on validation or, if it is to be reported, on test."""
    set_seed(seed)
    options.seed = seed
    material = bench.load_material(
        options.data, options.model, options.side, options.max_train_samples, options.max_test_samples
    )
    server = bench.load_backbone(options.model, options.side)
    images = material.splits["train"]
    mapping = None
    if options.head == "frozen":
        logits = bench.predict(Adapted(server, material), images.pixels)
        mapping = frequency_mapping(logits, images.labels, len(material.names), server.config.id2label)
    model = build(method, server, material, mapping, options)
    loss = None
    if learning_rate is not None:
        loss = bench.train(
            model,
            images,
            groups(model, learning_rate),
            epochs=options.epochs,
            batch_size=options.batch,
            flip=True,
        )
    images = material.splits["test" if report else "validation"]
    trained = bench.predict(model, images.pixels)
    row = {
        "accuracy": bench.accuracy(trained, images.labels),
        "train_loss_last_epoch": loss,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if loss else 0,
        "images": len(images.labels),
        "train_images": len(material.splits["train"].labels),
    }
    if not method.startswith("latent-"):
        shown = to_images(images.pixels, Image.Image)
        for encoding, logits in serve(method, model, server, shown, material.processor).items():
            row[f"{encoding.lower()}_accuracy"] = bench.accuracy(logits, images.labels)
            row[f"{encoding.lower()}_agreement"] = bench.accuracy(logits, trained.argmax(1))
    return row


def serve(method: str, model: nn.Module, server: nn.Module, images: list[Image.Image], processor) -> dict[str, Tensor]:
    """Answer prompted images, as PNG and as JPEG, with the unmodified server: logits of the task's classes."""
    head = mapping = None
    if method in ("static", "pgn"):
        prompter = make_prompter(model.model, processor)
        mapping, head = prompter.label_mapping, prompter.head
        images = [image for start in range(0, len(images), 50) for image in prompter(images[start : start + 50])]
        server = model.model.unload()
    elif method == "border":
        pixels = torch.stack([to_pixels(image, 3) for image in images]).float() / 255
        images = to_images(to_8_bit(model.prompted(pixels).detach()), Image.Image)
        mapping = model.model.model.mapping
    else:
        mapping = model.model.mapping
    answers = {}
    with torch.inference_mode():
        for encoding in ("PNG", "JPEG"):
            logits = []
            for start in range(0, len(images), 50):
                pixel_values = through(encoding, images[start : start + 50], processor)
                if head is None:
                    logits.append(server(pixel_values).logits)
                else:
                    logits.append(head(server.vit(pixel_values).last_hidden_state[:, 0]))
            answers[encoding] = torch.cat(logits) if mapping is None else torch.cat(logits)[:, mapping]
    return answers


def run_all(options: argparse.Namespace) -> list[dict]:
    """Run what is missing in the results file, and return the rows to be reported."""
    results = bench.Results(options.results)
    names = ("head", "side", "epochs", "batch", "library_size", "generator_image_size", "num_virtual_tokens")
    common = {name: getattr(options, name) for name in names} | {"data": Path(options.data).name}

    def cell(method: str, learning_rate: float | None, seed: int, report: bool) -> dict:
        key = {"method": method, "learning_rate": learning_rate, "seed": seed, "report": report}
        return results.get(key | common, lambda: run(method, learning_rate, seed, report, options))

    reported = []
    for method in options.methods or METHODS[options.head]:
        rates = (None,) if method == "mapping" else GRIDS.get(method, GRID)[: options.grid]
        chosen = max((cell(method, rate, 0, False) for rate in rates), key=lambda row: row["accuracy"])
        rate = chosen["settings"]["learning_rate"]
        reported += [cell(method, rate, seed, True) for seed in options.seeds]
    return reported


def table(rows: list[dict]) -> str:
    """Make a Markdown table of the reported runs."""
    lines = [
        "| method | trained parameters | learning rate | seed | as trained | as PNG | agreement | as JPEG |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        served = ("png_accuracy", "png_agreement", "jpeg_accuracy")
        figures = " | ".join(f"{row[name]:.3f}" if name in row else "-" for name in ("accuracy", *served))
        settings = row["settings"]
        lines.append(
            f"| {settings['method']} | {row['trainable_parameters']:,} | {settings['learning_rate'] or '-'} "
            f"| {settings['seed']} | {figures} |"
        )
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train, validation and test.parquet, or any image data set")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--head", choices=("frozen", "trained"), default="frozen")
    parser.add_argument("--results", default="outputs/input_only.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--grid", type=int, default=2, help="use this many learning rates")
    parser.add_argument("--seeds", nargs="*", type=int, default=(1,))
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--generator_image_size", type=int, default=64)
    parser.add_argument("--num_virtual_tokens", type=int, help="by default one ring of patches")
    parser.add_argument("--max_train_samples", type=int, default=1000)
    parser.add_argument("--max_test_samples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = f"{folder}/images", f"{folder}/vit"
            options.results = f"{folder}/results.jsonl"
            options.side, options.epochs, options.grid, options.batch, options.library_size = 32, 1, 1, 8, 8
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        print(table(run_all(options)))


if __name__ == "__main__":
    main()
