"""What a frozen model buys: accuracy on corrupted images, and the model's own task after adaptation.

    python benchmarks/robustness.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat \
        --own path/to/tinyimagenet50

Every method is trained as in `adaptation.py` (112 px, 1,000 images, 12 epochs), at the learning rate that the table
there has chosen, and tested on images with noise, blur, JPEG and another brightness, each at three strengths. `--own`
is a data set of ImageNet classes, whose `classes.json` has their indices; on it the model is asked with its own head
after adaptation, the adapter switched off where there is one. Every run is a line of the results file, and is not
repeated. `--smoke`: a tiny model on generated images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import adaptation
import bench
import heads
import methods
import report
from image_data import smoke_arguments

METHODS = ("head", "static", "pgn", "vpt-deep", "pgn-deep", "lora", "full")
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12),  # standard deviation, of pixels in [0, 1]
    "blur": (0.5, 1.0, 2.0),  # standard deviation, in pixels
    "jpeg": (50, 25, 10),  # quality
    "brightness": (1.2, 1.5, 2.0),  # factor
}


def corrupt(pixels: Tensor, kind: str, strength: float) -> Tensor:
    """Corrupt 8-bit pixels (N, C, H, W), the same way each time it is called."""
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
        return (pixels + 255 * strength * noise).round().clamp(0, 255).to(torch.uint8)
    if kind == "blur":
        return transforms.gaussian_blur(pixels, kernel_size=[13, 13], sigma=[strength, strength])
    if kind == "jpeg":
        return torch.stack([transforms.jpeg(image, int(strength)) for image in pixels.cpu()]).to(pixels.device)
    return transforms.adjust_brightness(pixels, strength)


def run(results: bench.Results, cell: adaptation.Cell, own: str | None) -> dict[str, Any]:
    """Train one model, and test it on clean and corrupted images, and on the model's own classes."""
    adaptation.run(results, cell)
    file = adaptation.state_file(results, cell)
    model, _ = adaptation.build(cell)
    model.load_state_dict(load_file(file, device=str(bench.DEVICE)), strict=False)
    file.unlink()
    split = adaptation.material_of(cell).splits["test"]
    accuracy = {"clean": bench.accuracy(bench.predict(model, split.pixels), split.labels)}
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            answers = bench.predict(model, corrupt(split.pixels, kind, strength))
            accuracy[f"{kind} {strength:g}"] = bench.accuracy(answers, split.labels)
    return {"accuracy": accuracy, "own_accuracy": None if own is None else own_accuracy(model, cell, own)}


def own_accuracy(model: nn.Module, cell: adaptation.Cell, own: str) -> float:
    """Return the accuracy on the model's own classes, with its own head, after it was adapted."""
    side = cell.common.side
    material = adaptation.load_material(own, cell.model, side, None, None)
    numbers = torch.tensor(heads.text_mapping(own), device=bench.DEVICE)
    adapted: Any = model.model  # type: ignore[attr-defined]
    if isinstance(adapted, methods.VPTDeep):
        for hook in adapted.hooks:
            hook.remove()
        adapted = adapted.backbone
    peft = hasattr(adapted, "disable_adapter")
    backbone = adapted.get_base_model() if peft else adapted
    if isinstance(backbone.classifier, nn.Linear):  # a new one: see `methods.new_head`
        backbone.classifier = bench.load_backbone(cell.model, side).classifier
    split = material.splits["test"]
    with adapted.disable_adapter() if peft else nullcontext():
        answers = bench.predict(lambda pixels: backbone(material.normalized(255 * pixels)).logits, split.pixels)
    return bench.accuracy(answers, numbers[split.labels])


def chosen_rates(data: str) -> dict[str, float | None]:
    """Return each method's learning rate in the table of `adaptation.py`."""
    rows = report.read(report.RESULTS, "small")
    return {method: runs.rate for (name, method), runs in report.chosen(rows).items() if name == data}


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table: a row a method, the mean over the strengths of each corruption."""
    lines = ["| method | clean | " + " | ".join(STRENGTHS) + " | own classes |", "|---" * (len(STRENGTHS) + 3) + "|"]
    for row in rows:
        found = row["accuracy"]
        means = [
            sum(found[f"{kind} {strength:g}"] for strength in strengths) / len(strengths)
            for kind, strengths in STRENGTHS.items()
        ]
        figures = [f"{figure:.3f}" for figure in (found["clean"], *means)]
        own = "-" if row["own_accuracy"] is None else f"{row['own_accuracy']:.3f}"
        name = report.NAMES.get(row["settings"]["method"], row["settings"]["method"])
        lines.append(f"| {name} | " + " | ".join([*figures, own]) + " |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--data", help="'digits', a folder with train, validation and test, or an id")
    parser.add_argument("--own", help="folder of a data set of the model's own classes, with classes.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="outputs/robustness.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        protocol, overrides = "small", (("precision", "float32"), ("evaluated_images", 500))
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = f"{folder}/images", f"{folder}/vit"
            options.results, options.methods = f"{folder}/results.jsonl", ("pgn", "full")
            protocol, overrides = "smoke", ()
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        rates = chosen_rates(Path(options.data).name)
        results = bench.Results(options.results)
        for method in options.methods:
            rate = rates.get(method, adaptation.METHODS[method][1][0])
            cell = adaptation.Cell(options.data, options.model, method, rate, options.seed, protocol, overrides)
            results.get(cell.settings, partial(run, results, cell, options.own))
        print(table(list(results)))


if __name__ == "__main__":
    main()
