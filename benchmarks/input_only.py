"""Ways to adapt a model through nothing but the image that is sent to it, side by side, as 8-bit PNGs.

    python benchmarks/input_only.py --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224

The server is a stock `ViTForImageClassification` behind its own image processor, with its own head: the task's classes
are read off its answers by a label mapping found by frequency on the training images (the same for all methods).

- mapping: the images as they are;
- border: visual prompting (Bahng et al. 2022): a learned border added to the image, 30 pixels wide at 224, 15 at 112;
- static: learned patches around the shrunk image, the same for all images;
- pgn: patches mixed for each image.

`--head trained` trains a linear head as well (for a server that lets one bring a head), with the linear probe in place
of the mapping, and latent prompts ("latent-static", "latent-pgn") to compare with.

All methods see the same images, flips, batches, epochs and schedule. Each one's learning rate is chosen from a grid of
equal size by the accuracy on validation with seed 0; the report is that of other seeds, on test images seen once,
after the last epoch. Figures are those of the PNGs: encoded, decoded, and through the server's processor; and of JPEGs
of quality 90, to see what they cost. Every run is
appended to a file of JSON lines, and one that is there is not repeated. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import image_data
from input_peers import Adapted, Border, Mapped, load_server, scale
from smoke_material import smoke_arguments

from pgn_peft import ImagePrompter, PGNConfig, frequency_mapping
from pgn_peft.preprocessing import Preprocessing, to_8_bit, to_images, to_pixels
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


def load_pixels(rows, preprocessing: Preprocessing, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) uint8 as the processor leaves them before it normalises, and their labels (N,)."""
    if limit is not None and limit < len(rows):
        rows = rows.train_test_split(train_size=limit, stratify_by_column="label", seed=0)["train"]
    pixels = torch.stack([preprocessing.apply(to_pixels(image, 3)) for image in rows["image"]])
    return pixels, torch.tensor(rows["label"])


def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return logits (N, M) for uint8 pixels."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(batch.float() / 255) for batch in pixels.split(50)])


def through(encoding: str, images: list[Image.Image], processor) -> Tensor:
    """Encode images, decode them, and run the server's processor."""
    decoded = []
    for image in images:
        file = io.BytesIO()
        image.save(file, encoding, **({"quality": 90} if encoding == "JPEG" else {}))
        decoded.append(Image.open(file))
    return processor(images=decoded, return_tensors="pt")["pixel_values"]


def build(method: str, server: nn.Module, preprocessing: Preprocessing, material: dict, options) -> nn.Module:
    """Make the model that a method trains."""
    labels, mapping = material["labels"], material["mapping"]
    server.requires_grad_(False)
    if method in ("mapping", "linear", "border"):
        if mapping is None:
            server.classifier = nn.Linear(server.config.hidden_size, len(labels))
            nn.init.normal_(server.classifier.weight, std=0.02)
            nn.init.zeros_(server.classifier.bias)
        mapped = Mapped(server, mapping)
        return Border(mapped, preprocessing, options.side) if method == "border" else Adapted(mapped, preprocessing)
    kind = method.removeprefix("latent-")
    common = {
        "generator": "static" if kind == "static" else "resnet10",
        "library_size": options.library_size,
        "generator_image_size": options.generator_image_size,
        "initial_logit_std": 4.0,
        "head": "trained" if mapping is None else "frozen",
        "label_mapping": mapping,
        "id2label": dict(enumerate(labels)),
    }
    if method.startswith("latent-"):
        return Adapted(get_peft_model(server, PGNConfig(**common)), preprocessing)
    mean, std = map(list, scale(preprocessing))
    pixel = PGNConfig(
        prompt_space="pixel", num_virtual_tokens=options.num_virtual_tokens, image_mean=mean, image_std=std, **common
    )
    model = get_peft_model(server, pixel)
    start_library_from_images(model, material["train"][0][:500].float() / 255, seed=options.seed)
    return Adapted(model, preprocessing)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, learning_rate: float, options) -> float:
    """Train what is trainable; return the mean loss of the last epoch."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            searched = "pgn_library" in name or name == "border" or name.startswith("model.server")
            groups.setdefault(learning_rate if searched else OTHER_LEARNING_RATE, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group, "lr": rate} for rate, group in groups.items()], weight_decay=0.0)
    steps = options.epochs * (len(pixels) // options.batch)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for epoch in range(options.epochs):
        model.train()
        losses = []
        for chosen in torch.randperm(len(pixels))[: steps // options.epochs * options.batch].view(-1, options.batch):
            batch = pixels[chosen].float() / 255
            flipped = torch.rand(len(batch)) < 0.5
            batch[flipped] = batch[flipped].flip(-1)
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"  epoch {epoch + 1} of {options.epochs}, loss {sum(losses) / len(losses):.3f}", flush=True)
    return sum(losses) / len(losses)


def run(method: str, learning_rate: float | None, seed: int, report: bool, options) -> dict:
    """Train one model; evaluate it as trained and through PNGs, on validation or, if it is to be reported, on test."""
    set_seed(seed)
    options.seed = seed
    processor = image_data.load_processor(options.model, options.side)
    preprocessing = Preprocessing.from_processor(processor)
    server = load_server(options.model, options.side)
    splits = image_data.load_splits(image_data.DataArguments(options.data), seed=0)
    material = {"train": load_pixels(splits["train"], preprocessing, options.max_train_samples)}
    material["labels"] = splits["train"].features["label"].names
    pixels, labels = material["train"]
    material["mapping"] = None
    if options.head == "frozen":
        logits = predict(Adapted(server, preprocessing), pixels)
        material["mapping"] = frequency_mapping(logits, labels, len(material["labels"]), server.config.id2label)
    model = build(method, server, preprocessing, material, options)
    start = time.perf_counter()
    loss = None if learning_rate is None else train(model, pixels, labels, learning_rate, options)
    seconds = time.perf_counter() - start
    pixels, labels = load_pixels(splits["test" if report else "validation"], preprocessing, options.max_test_samples)
    trained = predict(model, pixels)
    row = {
        "method": method,
        "head": options.head,
        "learning_rate": learning_rate,
        "seed": seed,
        "report": report,
        "accuracy": (trained.argmax(1) == labels).float().mean().item(),
        "train_loss_last_epoch": loss,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if loss else 0,
        "images": len(labels),
        "train_images": len(material["train"][0]),
        "seconds": round(seconds, 1),
    }
    if not method.startswith("latent-"):
        served = serve(method, model, server, to_images(pixels, Image.Image), processor)
        for encoding, logits in served.items():
            row[f"{encoding.lower()}_accuracy"] = (logits.argmax(1) == labels).float().mean().item()
            row[f"{encoding.lower()}_agreement"] = (logits.argmax(1) == trained.argmax(1)).float().mean().item()
    return row | settings(options) | versions()


def serve(method: str, model: nn.Module, server: nn.Module, images: list[Image.Image], processor) -> dict[str, Tensor]:
    """Answer prompted images, as PNG and as JPEG, with the unmodified server: logits of the task's classes."""
    head = mapping = None
    if method in ("static", "pgn"):
        prompter = ImagePrompter.from_adapter(model.model, processor)
        mapping, head = prompter.label_mapping, prompter.head
        images = [image for start in range(0, len(images), 50) for image in prompter(images[start : start + 50])]
        server = model.model.unload()
    elif method == "border":
        pixels = torch.stack([to_pixels(image, 3) for image in images]).float() / 255
        images = to_images(to_8_bit(model.prompted(pixels).detach()), Image.Image)
        mapping = model.server.mapping
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


def settings(options: argparse.Namespace) -> dict:
    """Return what, beside method, learning rate and seed, makes a run what it is."""
    names = ("side", "epochs", "batch", "library_size", "generator_image_size", "num_virtual_tokens")
    return {name: getattr(options, name) for name in names} | {"data": Path(options.data).name}


def versions() -> dict:
    """Return the software and hardware behind a figure."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}


def run_all(options: argparse.Namespace) -> list[dict]:
    """Run what is missing in the results file, and return the rows that belong to these settings."""
    results = Path(options.results)

    def cell(method: str, learning_rate: float | None, seed: int, report: bool) -> dict:
        key = {"method": method, "head": options.head, "learning_rate": learning_rate, "seed": seed, "report": report}
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found = next((row for row in rows if (key | settings(options)).items() <= row.items()), None)
        if found is None:
            print(f"{method}, learning rate {learning_rate}, seed {seed}, report {report}", flush=True)
            found = run(method, learning_rate, seed, report, options)
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found

    reported = []
    for method in options.methods or METHODS[options.head]:
        rates = (None,) if method == "mapping" else GRIDS.get(method, GRID)[: options.grid]
        chosen = max((cell(method, rate, 0, False) for rate in rates), key=lambda row: row["accuracy"])
        reported += [cell(method, chosen["learning_rate"], seed, True) for seed in options.seeds]
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
        lines.append(
            f"| {row['method']} | {row['trainable_parameters']:,} | {row['learning_rate'] or '-'} | {row['seed']} "
            f"| {figures} |"
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
        Path(options.results).parent.mkdir(parents=True, exist_ok=True)
        print(table(run_all(options)))


if __name__ == "__main__":
    main()
