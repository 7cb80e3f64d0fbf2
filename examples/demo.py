"""A demonstration in two minutes, offline: generated prompts adapt a frozen Vision Transformer to a new domain.

    python examples/demo.py

A tiny ViT is trained on pictures of flowers by day and frozen. It fails on the same flowers at night; PGN adapts it to
them without changing its weights. The script compares PGN with a linear
probe, static prompts (the same for every image) and full fine-tuning; each learning rate is chosen on validation. It
saves the adapter, loads it in a new process, compares the logits, and draws which library tokens a few images use.

It prints a table and ends with PGN's accuracy on the test images. `--smoke` does the same in a few seconds, with too
little training for a good accuracy. It needs space/flowers.py beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from peft import PeftModel, get_peft_model
from plotting import OURS, STYLE, THEIRS
from safetensors.torch import load_file, save_file
from space.flowers import NAMES, SEED, SIDE, Flowers, make_base, normalise, train
from torch import Tensor, nn
from transformers import ViTForImageClassification, set_seed
from transformers.utils.logging import disable_progress_bar

from pgn_peft import PGNConfig
from pgn_peft.training import parameter_groups

mpl.use("Agg")
from matplotlib import pyplot as plt

METHODS = {
    "linear probe": (1e-3, 1e-2),
    "static prompts": (3e-3, 1e-2),
    "PGN": (3e-3, 1e-2),
    "full fine-tuning": (3e-4, 1e-3),
}


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Compute the logits of many 8-bit images, in batches."""
    return torch.cat([model(normalise(batch)).logits for batch in images.split(256)])


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy on images and labels."""
    return (logits_of(model, data[0]).argmax(dim=-1) == data[1]).float().mean().item()


def adapt(method: str, base: Path, flowers: Flowers, rate: float, epochs: int) -> tuple[nn.Module, int]:
    """Adapt the base to the flowers at night; return the model and the number of trained parameters."""
    set_seed(SEED)
    model = ViTForImageClassification.from_pretrained(base)
    if method == "linear probe":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    elif method != "full fine-tuning":
        generator = "static" if method == "static prompts" else "resnet10"
        model = get_peft_model(
            model,
            PGNConfig(
                num_virtual_tokens=8,
                library_size=32,
                generator=generator,
                generator_image_size=SIDE // 2,
                generator_width=8,
                initializer_range=0.5,
            ),
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    train(model, parameter_groups(model, rate), flowers.night["train"], rate, epochs, f"{method}, rate {rate:g}")
    return model, trained


def check_in_new_process(model: PeftModel, base: Path, folder: Path, images: Tensor) -> None:
    """Save the adapter, load it in a new process, and stop if the logits differ by more than rounding errors."""
    model.save_pretrained(folder / "adapter")
    save_file({"pixel_values": images.contiguous()}, folder / "images.safetensors")
    code = """
import sys, torch, pgn_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification
base, adapter, images, answer = sys.argv[1:]
model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), adapter)
with torch.no_grad():
    save_file({"logits": model(load_file(images)["pixel_values"]).logits}, answer)
"""
    paths = (base, folder / "adapter", folder / "images.safetensors", folder / "logits.safetensors")
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, capture_output=True)
    with torch.no_grad():
        here = model(images).logits
    # Loaded weights have other addresses in memory, and some CPUs then add in another order.
    difference = ((load_file(paths[-1])["logits"] - here).abs().max() / here.abs().max()).item()
    if not difference < 1e-5:
        raise SystemExit(f"in a new process the adapter's logits differ by {difference:.1e} of the largest")
    for file in paths[2:]:
        file.unlink()
    print(f"saved to {folder / 'adapter'}, loaded in a new process: the same logits for {len(images)} images")


@torch.no_grad()
def draw(model: PeftModel, flowers: Flowers, file: Path) -> None:
    """Draw one test image per class, with the share of each library token in its prompts."""
    images, labels = flowers.night["test"]
    chosen = torch.stack([(labels == label).nonzero()[0, 0] for label in range(len(NAMES))])
    layer = model.get_base_model().vit.embeddings
    shares = layer.pgn_generator["default"](normalise(images[chosen])).mean(dim=1)  # (classes, L), summing to 1
    answers = logits_of(model, images[chosen]).argmax(dim=-1)
    plt.rcParams.update(STYLE)
    figure, rows = plt.subplots(len(NAMES), 2, figsize=(8, 7), width_ratios=[1, 6], layout="constrained", sharex="col")
    top = shares.max().item() * 1.3
    for (left, right), index, share, answer in zip(rows, chosen, shares, answers, strict=True):
        left.imshow(images[index].permute(1, 2, 0))
        left.set_axis_off()
        right.bar(range(len(share)), share, color=THEIRS, alpha=0.3)
        for token in share.topk(3).indices.tolist():
            right.bar(token, share[token], color=OURS)
            right.text(token, share[token], f" {token}", ha="center", va="bottom", fontsize=7)
        right.set(ylim=(0, top), yticks=[], ylabel=NAMES[answer])
        right.yaxis.label.set(rotation=0, ha="right", va="center")
        right.spines["left"].set_visible(False)
    rows[0, 1].set_title(
        "share of each library token in the prompts of an image, with the three largest labelled", fontsize=10
    )
    rows[-1, 1].set_xlabel("library token")
    figure.savefig(file)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"))
    parser.add_argument("--smoke", action="store_true", help="train for a moment only")
    options = parser.parse_args(command_line)
    epochs = 4 if options.smoke else 20
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)

    disable_progress_bar()
    flowers = Flowers()
    base = folder / "base"
    make_base(flowers, base, epochs)
    frozen = ViTForImageClassification.from_pretrained(base).eval()
    print(f"the base on flowers by day: {accuracy(frozen, flowers.day['test']):.3f}; at night:")
    rows = [
        ("frozen model", 0, "", accuracy(frozen, flowers.night["validation"]), accuracy(frozen, flowers.night["test"]))
    ]
    for method, rates in METHODS.items():
        runs = []
        for rate in rates[-1:] if options.smoke else rates:
            model, trained = adapt(method, base, flowers, rate, epochs)
            runs.append((accuracy(model, flowers.night["validation"]), rate, model))
        validation, rate, model = max(runs, key=lambda run: run[0])
        rows.append((method, trained, f"{rate:g}", validation, accuracy(model, flowers.night["test"])))
        if method == "PGN":
            check_in_new_process(model, base, folder, normalise(flowers.night["test"][0]))
            draw(model, flowers, folder / "library-tokens.png")

    print(f"\n{'method':<18}{'trained parameters':>20}{'learning rate':>15}{'validation':>12}{'test':>8}")
    for method, trained, rate, validation, test in rows:
        print(f"{method:<18}{trained:>20,}{rate:>15}{validation:>12.3f}{test:>8.3f}")
    print(f"\npicture of the tokens that images chose: {folder / 'library-tokens.png'}")
    figure = next(row[-1] for row in rows if row[0] == "PGN")
    print(f"test accuracy of PGN {figure:.3f}")
    return figure


if __name__ == "__main__":
    main()
