"""Draw the prompts of an adapter in pixel space: prompted images as a server receives them, and the library.

    python examples/show_prompts.py --prompter outputs/my-adapter/prompter --dataset path/to/images \
        --output_dir outputs/pictures

writes prompted.png (each image, the same image as it is sent, the change, and the use of each library entry) and
library.png (the library, most used entries first). `--smoke` trains a tiny model first, offline, in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib
import torch
from deploy_input_only import train_smoke
from image_data import DataArguments, class_names, load_splits, spread
from plotting import OURS, on_grey
from torch import Tensor

from pgn_peft import ImagePrompter
from pgn_peft.nn.images import read_images
from pgn_peft.nn.preprocessing import normalize

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def choose(rows, number: int) -> tuple[list, list[str]]:
    """Return images of as many classes as possible, and the names of their classes."""
    names, labels = class_names(rows), rows["label"]
    chosen = spread(rows, seed=0)[:number].tolist()
    return [rows[index]["image"] for index in chosen], [names[labels[index]] for index in chosen]


def to_pixels(prompter: ImagePrompter, images: list) -> Tensor:
    """Return preprocessed images (B, C, H, W) in [0, 1]."""
    pixels, _, _ = read_images(images, prompter.preprocessing, prompter.num_channels, prompter.layout.image_size)
    return pixels.float() / 255


@torch.inference_mode()
def usage(prompter: ImagePrompter, pixels: Tensor) -> Tensor | None:
    """Return the share of each library entry in the prompts of each image: (B, L); None without a generator."""
    if prompter.generator is None:
        return None
    mean, std = prompter.preprocessing.image_mean, prompter.preprocessing.image_std
    return prompter.generator(normalize(pixels, mean, std)).mean(dim=1)


@torch.inference_mode()
def draw_prompted(
    prompter: ImagePrompter, images: list, names: list[str], pixels: Tensor, shares: Tensor | None, file: Path
) -> None:
    """Draw images without and with prompts, the change, and the use of the library."""
    change = on_grey(prompter.prompted(pixels) - pixels).permute(0, 2, 3, 1)
    pictures = [("image", images), ("as it is sent", prompter(images)), ("change, on grey", list(change))]
    rows = len(pictures) + (shares is not None)
    figure, axes = plt.subplots(
        rows, len(images), figsize=(1.6 * len(images), 1.75 * rows), layout="constrained", squeeze=False
    )
    for row, (name, shown) in zip(axes, pictures, strict=False):
        row[0].set_ylabel(name, fontsize=8)
        for axis, picture in zip(row, shown, strict=True):
            axis.imshow(picture, interpolation="nearest")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=8)
    if shares is not None:
        axes[-1, 0].set_ylabel("library in use", fontsize=8)
        for axis, share in zip(axes[-1], shares, strict=True):
            axis.bar(range(len(share)), share, width=1, color=OURS)
            axis.set_ylim(0, shares.max().item() * 1.05)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_library(prompter: ImagePrompter, shares: Tensor | None, file: Path) -> None:
    """Draw the entries of the library on grey, the most used first."""
    library = on_grey(prompter.library)
    if shares is not None:
        library = library[shares.mean(dim=0).argsort(descending=True)]
    columns = 16
    figure, axes = plt.subplots(
        -(-len(library) // columns), columns, figsize=(8, 0.52 * -(-len(library) // columns)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, patch in zip(axes.flat, library, strict=False):
        axis.imshow(patch.permute(1, 2, 0), interpolation="nearest")
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98, 0.08, 0.08)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompter", help="folder or id of an ImagePrompter in pixel space")
    parser.add_argument("--dataset", help="images to prompt: the test split, or else validation")
    parser.add_argument("--number", type=int, default=8, help="number of images")
    parser.add_argument("--output_dir", default="outputs/pictures")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            train_smoke(Path(folder), options)
            options.output_dir = f"{folder}/pictures"
        if not (options.prompter and options.dataset):
            parser.error("--prompter and --dataset are required")
        prompter = ImagePrompter.from_pretrained(options.prompter)
        splits = load_splits(DataArguments(options.dataset), seed=0)
        images, names = choose(splits["test" if "test" in splits else "validation"], options.number)
        pixels = to_pixels(prompter, images)
        shares = usage(prompter, pixels)
        output = Path(options.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        draw_prompted(prompter, images, names, pixels, shares, output / "prompted.png")
        draw_library(prompter, shares, output / "library.png")
        print(f"saved prompted.png and library.png to {output}")
        if shares is not None:
            deviation = shares.std(dim=0).mean().item()
            print(f"mean spread of a library entry's share from image to image: {deviation:.3f}")


if __name__ == "__main__":
    main()
