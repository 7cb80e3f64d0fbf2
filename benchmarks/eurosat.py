"""PGN beside static prompts and a linear probe on real images, each with its settings chosen on validation.

    python benchmarks/eurosat.py --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224

All methods see the same images, augmentation, batches, epochs and schedule. The learning rate and, for prompts, the
scale they start from are chosen for each from a grid of equal size by the accuracy on validation with seed 0; the
chosen ones are then run with seeds 1, 2 and 3, and only these runs see the test split, once, after the last epoch.
Every run is appended to a file of JSON lines, and a run that is there already is not repeated, so an interrupted
benchmark goes on where it stopped.

`--protocol small` (the default): 1,000 training images for 12 epochs at 112 px, for a CPU: about three minutes a run
on two cores. `--protocol medium`: all 5,000 for 4 epochs at 112 px; `--settings_of small` takes the settings that were
chosen under the small protocol instead of choosing again.
`--protocol full`: all training images at 224 px, for an accelerator. `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import image_data
import train_image_classifier as script
from smoke_material import smoke_arguments

from pgn_peft.training import parameter_groups

# Settings to choose from on validation, four for each method: learning rate, and scale of the initial library.
GRIDS = {
    "linear": [(1e-3, None), (3e-3, None), (1e-2, None), (3e-2, None)],
    "static": [(3e-3, 0.02), (3e-3, 0.5), (1e-2, 0.02), (1e-2, 0.5)],
    "pgn": [(3e-3, 0.02), (3e-3, 0.5), (1e-2, 0.02), (1e-2, 0.5)],
}
PROTOCOLS = {
    "small": {"max_train_samples": 1000, "image_size": 112, "epochs": 12, "batch": 25, "generator_image_size": 64},
    "medium": {"max_train_samples": None, "image_size": 112, "epochs": 4, "batch": 25, "generator_image_size": 64},
    "full": {"max_train_samples": None, "image_size": None, "epochs": 12, "batch": 64, "generator_image_size": 64},
    "smoke": {"max_train_samples": None, "image_size": None, "epochs": 1, "batch": 8, "generator_image_size": None},
}
SELECTION_SEED, REPORT_SEEDS = 0, (1, 2, 3)


def build(method: str, model_path: str, labels: list[str], learning_rate: float, adapter: script.AdapterArguments):
    """Make the model of a method and its optimizer's parameter groups."""
    backbone = AutoModelForImageClassification.from_pretrained(model_path)
    if method == "linear":
        backbone.requires_grad_(False)
        backbone.classifier = nn.Linear(backbone.config.hidden_size, len(labels))
        nn.init.normal_(backbone.classifier.weight, std=0.02)
        nn.init.zeros_(backbone.classifier.bias)
        backbone.config.id2label = dict(enumerate(labels))
        return backbone, parameter_groups(backbone, learning_rate)
    model = get_peft_model(backbone, adapter.config(labels, None, None, None))
    return model, parameter_groups(model, learning_rate)


def run(method: str, learning_rate: float, scale: float | None, seed: int, report: bool, options) -> dict:
    """Train one model and evaluate it on validation, and on test if its figure is to be reported."""
    protocol = PROTOCOLS[options.protocol]
    set_seed(seed)
    data = image_data.DataArguments(
        dataset=options.data,
        max_train_samples=protocol["max_train_samples"],
        augmentation=options.augmentation,
        image_size=protocol["image_size"],
    )
    splits = image_data.load_splits(data, seed=0)
    labels = splits["train"].features["label"].names
    processor = image_data.load_processor(options.model, data.image_size)
    image_data.add_transforms(splits, processor, data.augmentation)
    adapter = script.AdapterArguments(
        model_name_or_path=options.model,
        generator="static" if method == "static" else "resnet10",
        num_virtual_tokens=options.num_virtual_tokens,
        library_size=options.library_size,
        generator_image_size=protocol["generator_image_size"],
        initializer_range=scale or 0.02,
        initial_logit_std=options.initial_logit_std,
    )
    model, parameters = build(method, options.model, labels, learning_rate, adapter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = script.Arguments(
            output_dir=folder,
            learning_rate=learning_rate,
            num_train_epochs=protocol["epochs"],
            per_device_train_batch_size=protocol["batch"],
            seed=seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
            logging_strategy="epoch",
        )
        trainer = script.make_trainer(model, splits, arguments, parameters, len(labels), data.image_size)
        start = time.perf_counter()
        outcome = trainer.train()
        row = {
            "method": method,
            "learning_rate": learning_rate,
            "initializer_range": scale,
            "seed": seed,
            "report": report,
            "validation_accuracy": trainer.evaluate()["eval_accuracy"],
            "test_accuracy": trainer.evaluate(splits["test"])["eval_accuracy"] if report else None,
            "train_loss_last_epoch": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "train_images": len(splits["train"]),
            "train_images_per_second": outcome.metrics["train_samples_per_second"],
            "seconds": round(time.perf_counter() - start, 1),
        }
    return row | settings(options) | versions()


def settings(options: argparse.Namespace) -> dict:
    """Return what, beside method, grid and seed, makes a run what it is."""
    names = ("protocol", "augmentation", "num_virtual_tokens", "library_size")
    # Written down only where it is used: it came after the first runs.
    names += ("initial_logit_std",) if options.initial_logit_std else ()
    return {name: getattr(options, name) for name in names} | {"data": Path(options.data).name}


def versions() -> dict:
    """Return the software and hardware behind a figure."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def run_all(options: argparse.Namespace) -> list[dict]:
    """Run what is missing in the results file, selection first, and return all its rows."""
    results = Path(options.results)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    selection = settings(options) | {"protocol": options.settings_of or options.protocol}
    selection.pop("initial_logit_std", None)
    chosen_from = [row for row in rows if selection.items() <= row.items() and not row["report"]]
    rows = [row for row in rows if settings(options).items() <= row.items()]
    if not options.initial_logit_std:
        rows = [row for row in rows if "initial_logit_std" not in row]

    def choose(method: str) -> tuple[float, float | None]:
        if options.settings_of is None:
            points = GRIDS[method][: options.grid]
            return max(points, key=lambda point: cell(method, *point, SELECTION_SEED, False)["validation_accuracy"])
        grid = [row for row in chosen_from if row["method"] == method]
        if not grid:
            raise SystemExit(
                f"`settings_of` must be a protocol that was run, but got {options.settings_of!r}. Run it."
            )
        best = max(grid, key=lambda row: row["validation_accuracy"])
        return best["learning_rate"], best["initializer_range"]

    def cell(method: str, learning_rate: float, scale: float | None, seed: int, report: bool) -> dict:
        key = {"method": method, "learning_rate": learning_rate, "initializer_range": scale}
        key |= {"seed": seed, "report": report}
        found = next((row for row in rows if key.items() <= row.items()), None)
        if found is None:
            print(f"{method}, learning rate {learning_rate:g}, initial scale {scale}, seed {seed}", flush=True)
            found = run(method, learning_rate, scale, seed, report, options)
            rows.append(found)
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found

    for method in options.methods:
        for seed in options.seeds:
            cell(method, *choose(method), seed, True)
    return rows


def table(rows: list[dict]) -> str:
    """Make a Markdown table of the reported runs."""
    lines = [
        "| method | trainable parameters | learning rate, initial scale | validation | test | test by seed |",
        "|---|---|---|---|---|---|",
    ]
    for method in GRIDS:
        reported = [row for row in rows if row["method"] == method and row["report"]]
        if reported:
            tests = [row["test_accuracy"] for row in reported]
            spread = f" ± {statistics.stdev(tests):.3f}" if len(tests) > 1 else ""
            lines.append(
                f"| {method} | {reported[0]['trainable_parameters']:,} | {reported[0]['learning_rate']:g}, "
                f"{reported[0]['initializer_range'] or '-'} "
                f"| {statistics.mean(row['validation_accuracy'] for row in reported):.3f} "
                f"| {statistics.mean(tests):.3f}{spread} | {', '.join(f'{test:.3f}' for test in tests)} |"
            )
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train, validation and test.parquet, or any image data set")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--results", default="outputs/eurosat.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--protocol", choices=("small", "medium", "full"), default="small")
    parser.add_argument("--settings_of", choices=("small", "medium", "full"), help="protocol whose choice is used")
    parser.add_argument("--methods", nargs="+", choices=tuple(GRIDS), default=tuple(GRIDS))
    parser.add_argument("--grid", type=int, default=4, help="use this many points of each grid")
    parser.add_argument("--seeds", nargs="*", type=int, default=REPORT_SEEDS)
    parser.add_argument("--augmentation", choices=tuple(image_data.AUGMENTATIONS), default="flip")
    parser.add_argument("--num_virtual_tokens", type=int, default=16)
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--initial_logit_std", type=float, default=0.0, help="for PGN; the runs are kept apart")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = f"{folder}/images", f"{folder}/vit"
            options.results = f"{folder}/results.jsonl"
            options.protocol, options.grid, options.seeds = "smoke", 1, (1,)
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        Path(options.results).parent.mkdir(parents=True, exist_ok=True)
        print(table(run_all(options)))


if __name__ == "__main__":
    main()
