"""Classify a folder of images with an adapter, and write labels and scores to a CSV.

    python examples/predict.py --adapter user/my-adapter --images path/to/images --output predictions.csv

The adapter is an id on the Hub or an output folder of `train_image_classifier.py`. Base model, labels and image
processor come with it. The CSV has one row for each image: its path within the folder, and the best labels with their
scores:

    image,label,score,label_2,score_2
    blue/0.jpg,blue,0.605438,red,0.394562

Files that are damaged or not images are skipped with a message that gives the reason; with `--strict` the first one
stops the script. `--smoke` trains a tiny adapter and classifies its images offline, in seconds; it ends with

    80 images, mean score of the best label 0.636
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import train_image_classifier
from image_data import keep_images, list_files, open_image, smoke_arguments
from PIL import Image
from tqdm import tqdm
from transformers import Pipeline, pipeline

from pgn_peft import load_classifier
from pgn_peft.hub.image_processors import made_size


def find_images(folder: Path) -> list[Path]:
    """List the image files of a folder and its subfolders in order, or a single file; symbolic links are followed."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {str(folder)!r}. Look for a misspelt path.")
    files = keep_images(list_files(folder))
    if not files:
        raise SystemExit(f"There are no images in {str(folder)!r}.")
    return files


def read_images(files: list[Path], strict: bool, skipped: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Read images as upright RGB; print the names of those that cannot be read, and append them to `skipped`."""
    for file in files:
        try:
            image = open_image(file)
        except ValueError as error:
            if strict:
                raise SystemExit(f"{error} Or leave --strict out.") from error
            tqdm.write(f"skipping {file}: {error}", file=sys.stderr)
            skipped.append(file)
        else:
            yield file, image


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """Load the adapter with its model; or a whole model, which `--method auto --allow_weights true` may choose."""
    names = os.listdir(options.adapter) if os.path.isdir(options.adapter) else []
    if "config.json" in names and "adapter_config.json" not in names:
        return pipeline("image-classification", model=options.adapter, device=options.device)
    classifier = load_classifier(
        options.adapter,
        base_model_name_or_path=options.base_model,
        revision=options.revision,
        subfolder=options.subfolder,
    )
    return classifier.pipeline(device=options.device)


def predict(options: argparse.Namespace) -> float:
    """Classify, write the CSV, and return the mean score of the best labels."""
    folder = Path(options.images).expanduser()
    files = find_images(folder)
    classify = load_pipeline(options)
    # A processor that resizes the shorter side and does not crop makes images of different shapes.
    fixed = made_size(classify.image_processor, (64, 96)) == made_size(classify.image_processor, (96, 64))
    top_k = max(1, min(options.top_k, classify.model.config.num_labels))
    header = ["image", "label", "score"]
    header += [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "score")]
    skipped: list[Path] = []
    best: list[float] = []
    images = read_images(files, options.strict, skipped)
    target = Path(options.output).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as output, tqdm(total=len(files)) as progress:
        rows = csv.writer(output)
        rows.writerow(header)
        while batch := [pair for _, pair in zip(range(options.batch_size), images, strict=False)]:
            answers = classify([image for _, image in batch], top_k=top_k, batch_size=len(batch) if fixed else 1)
            for (file, _), answer in zip(batch, answers, strict=True):
                cells = [cell for entry in answer for cell in (entry["label"], f"{entry['score']:.6f}")]
                rows.writerow([file.relative_to(folder if folder.is_dir() else folder.parent).as_posix(), *cells])
                best.append(answer[0]["score"])
            progress.update(len(best) + len(skipped) - progress.n)
    if skipped:
        print(f"skipped {len(skipped)} of {len(files)} files that could not be read")
    if not best:
        raise SystemExit(f"No image in {str(folder)!r} could be read; see above.")
    print(f"wrote {target}")
    mean = sum(best) / len(best)
    print(f"{len(best)} images, mean score of the best label {mean:.3f}")
    return mean


def main(command_line: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder or id of an adapter")
    parser.add_argument("--images", help="folder of images, with or without subfolders, or one image")
    parser.add_argument("--output", default="predictions.csv", help="the CSV to write")
    parser.add_argument("--top_k", type=int, default=2, help="labels for each image")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--device", help="as for transformers.pipeline, 'cuda' or 'cpu'; by default a GPU if there is one"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")
    parser.add_argument("--subfolder", help="folder of the adapter in its repository")
    parser.add_argument("--base_model", help="path of the base model, instead of the one that the adapter names")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    parser.add_argument("--smoke", action="store_true", help="a tiny adapter on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            train_image_classifier.main(smoke_arguments(Path(folder)))
            options.adapter, options.images = f"{folder}/adapter", f"{folder}/images"
            options.output = f"{folder}/predictions.csv"
        if not (options.adapter and options.images):
            parser.error("--adapter and --images are required")
        return predict(options)


if __name__ == "__main__":
    main()
