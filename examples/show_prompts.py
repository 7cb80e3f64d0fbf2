"""Draw images before and after an adapter in pixel space changes them, each with what the model says to it.

    python examples/show_prompts.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --prompter outputs/my-adapter/prompter --dataset path/to/images --output_dir outputs/pictures

writes prompted.png: test images with the label that the unmodified model gives them; below them what is sent, with the
class that is read from the model's scores, and the right one in brackets if it is another. `--smoke` trains a tiny
model first, offline, in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib
from deploy_input_only import train_smoke
from image_data import DataArguments, class_names, load_splits, spread
from PIL import Image
from plotting import OURS
from transformers import pipeline

from pgn_peft import ImagePrompter

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(
    images: list[Image.Image], prompted: list[Image.Image], before: list[str], after: list[str], file: Path
) -> None:
    """Draw a row of images with the answers to them, and below it a row of what is sent."""
    figure, axes = plt.subplots(2, len(images), figsize=(2.2 * len(images), 5), layout="constrained", squeeze=False)
    for row, pictures, answers in zip(axes, (images, prompted), (before, after), strict=True):
        for axis, picture, answer in zip(row, pictures, answers, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(answer, fontsize=11, color=OURS if pictures is prompted else "black")
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("the model's own answer", fontsize=11)
    axes[1, 0].set_ylabel("prompted, your classes", fontsize=11, color=OURS)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="the model that images are sent to")
    parser.add_argument("--prompter", help="folder or id of an ImagePrompter in pixel space")
    parser.add_argument("--dataset", help="images to prompt: the test split, or else validation")
    parser.add_argument("--number", type=int, default=4, help="number of images, of as many classes as possible")
    parser.add_argument("--output_dir", default="outputs/pictures")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            train_smoke(Path(folder), options)
            options.output_dir = f"{folder}/pictures"
        if not (options.model_name_or_path and options.prompter and options.dataset):
            parser.error("--model_name_or_path, --prompter and --dataset are required")
        prompter = ImagePrompter.from_pretrained(options.prompter)
        splits = load_splits(DataArguments(options.dataset), seed=0)
        rows = splits["test" if "test" in splits else "validation"]
        chosen = spread(rows, seed=0)[: options.number].tolist()
        images = [rows[index]["image"].convert("RGB") for index in chosen]
        classes = [class_names(rows)[rows[index]["label"]] for index in chosen]
        model = pipeline("image-classification", model=options.model_name_or_path)
        prompted = [prompter(image) for image in images]
        before = [model(image, top_k=1)[0]["label"].split(",")[0] for image in images]
        answers = [prompter.read_answer(model(image, top_k=len(prompter.server_labels)))[0] for image in prompted]
        output = Path(options.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        found = [answer["label"] for answer in answers]
        after = [name if name == right else f"{name} ({right})" for name, right in zip(found, classes, strict=True)]
        draw(images, prompted, before, after, output / "prompted.png")
        print(f"saved {output / 'prompted.png'}")
        for name, own, answer in zip(classes, before, answers, strict=True):
            print(f"{name}: {own} -> {answer['label']}, score {answer['score']:.3f}")


if __name__ == "__main__":
    main()
