"""The time of a step: PGN, other methods, and the frozen model.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models vit-s16 --methods pgn static frozen --compile --batch_sizes 1 8 64
    python benchmarks/step_time.py --models clip-b32 --methods static "pgn, 64 px" pgn-dense pgn-sum
    python benchmarks/step_time.py --show benchmarks/results/step_time.jsonl   # what was measured

All methods of a model take turns in one process, forwards and backwards, and ratios are taken turn by turn, so that a
busy machine affects all of them alike. Seconds are medians. A training step is forward, backward and AdamW; weights
are random, since the cost does not depend on their values.

"saved" are the saved activations of a step; for peak memory see `memory.py`. The generator of "pgn" sees the whole
image, as in the official code; those of all others see 64 px, the default. `--smoke`: a tiny model, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from typing import Any

import bench
import methods
import timing
import torch
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from pgn_peft import use_texts

MODELS = {
    "deit-tiny": timing.SIZES["Ti/16"],
    "vit-s16": timing.SIZES["S/16"],
    "vit-b32": timing.SIZES["B/32"],
    "vit-b16": timing.SIZES["B/16"],
    "dinov2-small": timing.SIZES["S/14"],
    "clip-b32": timing.SIZES["B/32"],  # its image tower, with texts as the head: for PGN's methods
    "smoke": timing.SIZES["tiny"],
}


def make_backbone(name: str, precision: str) -> PreTrainedModel:
    """Make a model with random weights."""
    # As in `bench.load_backbone`: torch's fused attention is slow in bfloat16 on CPUs.
    plain = bench.DEVICE.type == "cpu" and precision == "bfloat16"
    fields = MODELS[name].to_diff_dict() | {"attn_implementation": "eager" if plain else "sdpa"}
    fields.pop("model_type", None)
    if name == "dinov2-small":
        model = Dinov2ForImageClassification(Dinov2Config(**fields))
    elif name == "clip-b32":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))
    else:
        model = ViTForImageClassification(type(MODELS[name])(**fields))
    return model.eval().to(bench.DEVICE)


def make_runners(cell: dict[str, Any]) -> dict[str, timing.Runner]:
    """Make what is timed of one cell of the table."""
    torch.manual_seed(0)
    torch.compiler.reset()  # of an earlier cell's models, which count towards the limit of compilations
    material = timing.random_material(MODELS[cell["model"]].image_size, cell["batch_size"])
    texts = cell["model"] == "clip-b32"
    config = {"library_size": cell["library_size"]} | ({"head": "text"} if texts else {})
    runners = {}
    for name in cell["methods"]:
        backbone = make_backbone(cell["model"], cell["precision"])
        model, groups = methods.build_measured(name, backbone, material, cell["num_virtual_tokens"], config)
        if texts:
            embeddings = torch.randn(timing.NUM_LABELS, backbone.config.projection_dim)
            use_texts(model.model, F.normalize(embeddings, dim=-1))
        model.to(bench.DEVICE)
        runners[name] = timing.Runner(model, groups, material.splits["train"], cell["precision"])
    if cell["compiled"]:
        # Beside the same models as they are, so that the ratio is one of the same turns.
        runners |= {f"{name}, compiled": runner.compiled() for name, runner in runners.items()}
    return runners


def measure(cell: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time all methods of a cell."""
    runners = make_runners(cell)
    training = {name: runner.train for name, runner in runners.items() if runner.optimizer is not None}
    train_seconds = timing.take_turns(training, rounds)
    infer_seconds = timing.take_turns({name: runner.infer for name, runner in runners.items()}, rounds)
    measured = {}
    for name, runner in runners.items():
        parameters = list(runner.model.parameters())
        runner.call = runner.model  # saved activations are counted without compilation
        row = {
            "inference_seconds": statistics.median(infer_seconds[name]),
            "inference_ratios": {other: timing.ratio(infer_seconds, name, other) for other in runners},
            "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
        }
        if name in training:
            row |= {
                "train_seconds": statistics.median(train_seconds[name]),
                "saved_bytes": timing.count_saved_bytes(runner.forward, parameters),
                "train_ratios": {other: timing.ratio(train_seconds, name, other) for other in training},
            }
        measured[name] = row
    return {"rounds": rounds, "measured": measured}


def table(row: dict[str, Any]) -> str:
    """Write one cell as Markdown, a line for each method."""
    settings, environment = row["settings"], row["environment"]
    lines = [["", "training step, ms", "/ static", "/ full", "saved, MB", "inference, ms", "/ static", "/ frozen"]]
    for name, each in row["measured"].items():
        train, infer = each.get("train_ratios", {}), each["inference_ratios"]
        cells = [""] * 4
        if train:
            cells = [f"{1e3 * each['train_seconds']:.0f}", decimals(train.get("static")), decimals(train.get("full"))]
            cells.append(f"{each['saved_bytes'] / 1e6:.0f}")
        cells.append(f"{1e3 * each['inference_seconds']:.0f}")
        lines.append([name, *cells, decimals(infer.get("static")), decimals(infer.get("frozen"))])
    title = (
        f"{title_of(row)}, P = {settings['num_virtual_tokens']}, L = {settings['library_size']}, "
        f"{environment['device']}, {environment['threads']} threads"
    )
    return f"{title}\n\n{bench.markdown(lines)}"


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Write the ratios of cells side by side: of those that have static prompts, full fine-tuning and the model."""
    rows = [row for row in rows if {"static", "full", "frozen"} <= row["measured"].keys()]
    names = dict.fromkeys(name for row in rows for name in row["measured"])
    tables = []
    for kind, other, title in (
        ("train", "static", "training step / static prompts"),
        ("train", "full", "training step / full fine-tuning"),
        ("inference", "static", "inference / static prompts"),
        ("inference", "frozen", "inference / the frozen model"),
    ):
        lines = [[title, *map(title_of, rows)]]
        for name in names:
            ratios = [row["measured"].get(name, {}).get(f"{kind}_ratios", {}).get(other) for row in rows]
            if any(ratios):
                lines.append([name, *map(decimals, ratios)])
        tables.append(bench.markdown(lines))
    return "\n\n".join(tables)


def title_of(row: dict[str, Any]) -> str:
    """Name a cell."""
    return "{model}, {precision}, batch {batch_size}".format(**row["settings"])


def decimals(number: float | None) -> str:
    """Write a ratio with two decimals."""
    return "" if number is None else f"{number:.2f}"


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in MODELS if name != "smoke"]
    parser.add_argument("--models", nargs="+", choices=real, default=[name for name in real if name != "clip-b32"])
    parser.add_argument("--methods", nargs="+", choices=methods.MEASURED, default=list(methods.MEASURED))
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--num_virtual_tokens", type=int, default=16)
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="also compile each model as a whole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--results", default="outputs/step_time.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--show", metavar="RESULTS", help="print the tables of a results file and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args(command_line)
    if options.show:
        rows = list(bench.Results(options.show))
        print(*map(table, rows), summary(rows), sep="\n\n")
        return
    transformers_logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            options.models, options.batch_sizes, options.rounds = ["smoke"], [2], 2
            options.precisions, options.num_virtual_tokens = ["float32"], 4
            options.results = f"{folder}/results.jsonl"
        results = bench.Results(options.results)
        rows = []
        for model in options.models:
            for precision in options.precisions:
                for batch_size in options.batch_sizes:
                    cell = {
                        "benchmark": "step_time",
                        "model": model,
                        "methods": list(options.methods),
                        "precision": precision,
                        "compiled": options.compile,
                        "batch_size": batch_size,
                        "num_virtual_tokens": options.num_virtual_tokens,
                        "library_size": options.library_size,
                        "threads": torch.get_num_threads(),
                    }
                    rows.append(results.get(cell, lambda cell=cell: measure(cell, options.rounds)))
                    print(table(rows[-1]), end="\n\n", flush=True)
                    if {"pgn", "static"} <= rows[-1]["measured"].keys():
                        ratio = rows[-1]["measured"]["pgn"]["train_ratios"]["static"]
                        print(f"training step, PGN / static prompts: {ratio:.3f}", end="\n\n", flush=True)
        if len(rows) > 1:
            print(summary(rows))


if __name__ == "__main__":
    main()
