"""Is the loader the bottleneck? Images per second of each stage of the data path, and of a training step.

    python benchmarks/data_path.py --data path/to/images --model path/to/deit-tiny-patch16-224

`stages`: one batch in this process: encoded images read, decoded, augmented, resized and normalised, collated; the
same from cached pixels. `loaders`: a DataLoader of `train_image_classifier.py`, with images as they are on the disk or
cached, with 0, 1 and 2 workers. `ratio` is its speed divided by the step's: above 1 it is not the bottleneck.
`training` is the speed of the step with this loader.

Everything is measured in turn, round after round, in one process; a figure is the median of its rounds, and a ratio
that of the rounds' ratios. A step is forward, backward and AdamW on DeiT-Tiny with PGN as the script makes it. The row
is appended to a file of JSON lines and printed as Markdown; one that is in it is not repeated. `--smoke`: tiny,
offline, in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import image_data
from datasets import Image
from image_data import smoke_arguments
from image_folder import UprightImage
from image_transforms import AUGMENTATIONS, add_transforms, cache_images, pixels_from_bytes

from pgn_peft import ImageCollator, PGNConfig

Rounds = dict[tuple, list[float]]


class Step:
    """A training step of the script's adapter on batches of one size."""

    def __init__(self, material: Material, precision: str) -> None:
        backbone = bench.load_backbone(material.model, material.side)
        config = PGNConfig(num_virtual_tokens=16, library_size=64, generator_image_size=64, generator_width=16)
        config.id2label = dict(enumerate(material.names))
        self.model = get_peft_model(backbone, config).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        self.precision = precision

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Train on a batch of the collator's."""
        batch = {name: values.to(bench.DEVICE, non_blocking=True) for name, values in batch.items()}
        with bench.autocast(self.precision):
            loss = self.model(**batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Material:
    """A data set's training images, as they are and cached, and the image processor."""

    def __init__(self, data: str, model: str, side: int | None) -> None:
        self.model, self.side = model, side
        self.processor = image_data.load_processor(model, side)
        arguments = image_data.DataArguments(data)
        self.plain = image_data.load_splits(arguments, seed=0)
        self.cached = cache_images(self.plain, self.processor)
        self.names = self.plain["train"].features["label"].names
        self.collate = ImageCollator(len(self.names))

    def loader(self, source: str, augmentation: str, workers: int, batch_size: int) -> DataLoader:
        """Make the loader that the script would make."""
        more = {
            "batch_size": batch_size,
            "num_workers": workers,
            "pin_memory": bench.DEVICE.type == "cuda",
            "drop_last": True,
        }
        splits = self.cached if source == "cached" else self.plain
        add_transforms(splits, self.processor, augmentation)
        # A view, which keeps its transform when the next loader's is set.
        rows = splits["train"].with_transform(splits["train"].format["format_kwargs"]["transform"])
        return DataLoader(rows, shuffle=True, collate_fn=self.collate, **more)

    def stages(self, count: int) -> dict[str, Callable[[], Any]]:
        """Return what is done to `count` images, one stage a function of no arguments."""
        encoded = self.plain["train"].with_format(None).cast_column("image", Image(decode=False)).shuffle(seed=0)
        cached = self.cached["train"].with_format(None).shuffle(seed=0)
        rows, pixel_rows = encoded[:count]["image"], cached[:count]["pixels"]
        image = UprightImage()
        images = [image.decode_example(row) for row in rows]
        finished = self.processor(images=images, return_tensors="pt")["pixel_values"]
        side = tuple(finished.shape[-2:])
        pixels = [pixels_from_bytes(row, side) for row in pixel_rows]
        examples = [{"pixel_values": values, "labels": 0} for values in finished]
        as_they_are = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return {
            "read": lambda: encoded[:count],
            "decode": lambda: [image.decode_example(row) for row in rows],
            "augment, official": lambda: [AUGMENTATIONS["official"](one) for one in images],
            "augment, flip": lambda: [AUGMENTATIONS["flip"](one) for one in images],
            "resize and normalise": lambda: self.processor(images=images, return_tensors="pt"),
            "collate": lambda: self.collate(examples),
            "cached: read": lambda: [pixels_from_bytes(row, side) for row in cached[:count]["pixels"]],
            "cached: augment, official": lambda: [AUGMENTATIONS["official"](one) for one in pixels],
            "cached: normalise": lambda: self.processor(images=pixels, **as_they_are),
        }


def rate(work: Callable[[], Any], images: int) -> float:
    """Return the images a second of a piece of work."""
    start = time.perf_counter()
    work()
    if bench.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def rate_of_loader(loader: DataLoader, batches: int, step: Callable[[Any], None] | None = None) -> float:
    """Return the images a second of a loader, or of a step that it feeds, once its workers have started."""
    stream = iter(loader)
    # Workers prefetch two batches each: these would come for nothing.
    for batch in itertools.islice(stream, 1 + 2 * loader.num_workers):
        if step is not None:
            step(batch)

    def work() -> None:
        for batch in itertools.islice(stream, batches):
            if step is not None:
                step(batch)

    return rate(work, batches * loader.batch_size)


def measure(material: Material, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in turn, `options.rounds` times."""
    count, batches = options.batch_size, max(1, options.images // options.batch_size)
    step, stages = Step(material, options.precision), material.stages(count)
    batch = next(iter(material.loader("plain", "none", 0, count)))
    step(batch)
    loaders = list(itertools.product(("plain", "cached"), options.augmentations, options.workers))
    steps: list[float] = []
    found: Rounds = {}
    for index in range(options.rounds):
        print(f"  round {index + 1} of {options.rounds}", flush=True)
        for name, work in stages.items():
            found.setdefault(("stage", name), []).append(rate(repeated(work, batches), count * batches))
        for kind in loaders:
            steps.append(rate(repeated(lambda: step(batch), batches), count * batches))
            alone = rate_of_loader(material.loader(*kind, count), batches)
            fed = rate_of_loader(material.loader(*kind, count), batches, step)
            for what, figure in {"alone": alone, "ratio": alone / steps[-1], "fed": fed / steps[-1]}.items():
                found.setdefault((what, *kind), []).append(figure)
    middle = {key: statistics.median(figures) for key, figures in found.items()}
    return {
        "step": round(statistics.median(steps), 1),
        "stages": {key[1]: round(figure, 1) for key, figure in middle.items() if key[0] == "stage"},
        "loaders": [
            {
                "source": kind[0],
                "augmentation": kind[1],
                "workers": kind[2],
                "images_per_second": round(middle["alone", *kind], 1),
                "ratio": round(middle["ratio", *kind], 3),
                "training": round(middle["fed", *kind], 3),
            }
            for kind in loaders
        ],
    }


def repeated(work: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return the same work, done so many times."""

    def do() -> None:
        for _ in range(times):
            work()

    return do


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Lay a table out in Markdown."""
    lines = [list(header), ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def show(row: dict[str, Any]) -> str:
    """Lay a row of the results out in Markdown."""
    settings, environment = row["settings"], row["environment"]
    stages = [(name, f"{figure:,.0f}", f"{1000 / figure:.2f}") for name, figure in row["stages"].items()]
    loaders = [
        (
            loader["source"],
            loader["augmentation"],
            loader["workers"],
            f"{loader['images_per_second']:,.0f}",
            f"{loader['ratio']:.2f}",
            f"{100 * loader['training']:.0f} %",
        )
        for loader in row["loaders"]
    ]
    return "\n\n".join(
        [
            f"{settings['data']}, {settings['side'] or 'default'} px, batches of {settings['batch_size']}, on "
            f"{environment['device']} with {environment['threads']} threads: a training step takes {row['step']:,.0f} "
            "images a second.",
            table(("stage", "images a second", "ms an image"), stages),
            table(("images", "augmentation", "workers", "images a second", "ratio", "training"), loaders),
        ]
    )


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images or of parquet files")
    parser.add_argument("--model", help="id or path of the backbone")
    parser.add_argument("--side", type=int, help="of the images, in pixels; by default the model's")
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--images", type=int, default=100, help="a figure in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--augmentations", nargs="+", default=["official", "none"], choices=AUGMENTATIONS)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--results", default="outputs/data_path.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model, options.results = f"{folder}/images", f"{folder}/vit", f"{folder}/results"
            options.batch_size, options.images, options.rounds = 4, 8, 1
            options.augmentations, options.workers = ["official"], [0, 1]
        if options.data is None or options.model is None:
            parser.error("--data and --model must be given, or --smoke")
        settings = {key: value for key, value in vars(options).items() if key not in ("results", "smoke", "model")}
        settings |= {"data": Path(options.data).name, "model": Path(options.model).name}
        row = bench.Results(options.results).get(
            settings, lambda: measure(Material(options.data, options.model, options.side), options)
        )
    print(show(row))
    fastest = max(row["loaders"], key=lambda loader: loader["ratio"])
    print(f"\nfastest loader: {fastest['source']}, {fastest['workers']} workers, ratio {fastest['ratio']:.3f}")


if __name__ == "__main__":
    main()
