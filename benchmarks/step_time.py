"""The cost of a step: PGN, other methods, the frozen model, and the hardware's limit.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models vit-s16 --methods pgn static frozen --compile --batch_sizes 1 8 64
    python benchmarks/step_time.py --models vit-b32 --methods pgn --official path/to/checkout   # see official_code.py
    python benchmarks/step_time.py --show benchmarks/results/step_time.jsonl   # what was measured

All methods of a model take turns in one process, forwards and backwards, and ratios are taken turn by turn, so that a
busy machine affects all of them alike. Seconds are medians. A training step is forward, backward and AdamW; weights
are random, since the cost does not depend on their values. "Floor" is the time of the step's counted operations at the
rate of a large product of matrices, or of its bytes at the rate of a large copy, whichever is longer, both measured in
the same turns; "/ floor" is how many times as long the step takes.

Peak memory is measured where there is an accelerator; on a CPU see `memory.py`, which gives each method a process.
"saved" are the saved activations of a step.

`--smoke`: a tiny model, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import methods
import official_code
import step_tables
import timing
from sizes import NUM_LABELS, SIZES, random_material

from pgn_peft import use_texts

MODELS = {
    "deit-tiny": SIZES["Ti/16"],
    "vit-s16": SIZES["S/16"],
    "vit-b32": SIZES["B/32"],
    "vit-b16": SIZES["B/16"],
    "dinov2-small": SIZES["S/14"],
    "clip-b32": SIZES["B/32"],  # its image tower, with texts as the head: for `--methods static pgn` and the like
    "smoke": SIZES["tiny"],
}
# What the generator sees: the whole image, as in the official code, or what it does by default (as all others here).
SIDES = {"pgn": None, "pgn, 64 px": 64}


METHODS: dict[str, Callable[..., methods.Built]] = {
    "frozen": methods.frozen,
    "static": methods.static,
    "pgn": methods.pgn,
    "pgn, 64 px": methods.pgn,
    "pgn-pixel": methods.pgn_pixel,
    "pgn-dense": methods.pgn_dense,
    "vpt-deep": methods.vpt_deep,
    "pgn-deep": methods.pgn_deep,
    "lora": methods.lora,
    "linear": methods.linear,
    "full": methods.full,
}


def make_backbone(name: str, precision: str, **more: Any) -> PreTrainedModel:
    """Make a model with random weights; `more` are fields of its config."""
    # As in `bench.load_backbone`: torch's fused attention is slow in bfloat16 on CPUs.
    plain = bench.DEVICE.type == "cpu" and precision == "bfloat16"
    config = MODELS[name].config(attn_implementation="eager" if plain else "sdpa", **more)
    if name == "dinov2-small":
        model = Dinov2ForImageClassification(Dinov2Config(**config.to_diff_dict()))
    elif name == "clip-b32":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.to_diff_dict()))
    else:
        model = ViTForImageClassification(config)
    return model.eval().to(bench.DEVICE)


class Runner:
    """One method on one model: its training step and its inference.

    Args:
        model: pixels (B, C, H, W) in [0, 1] to logits.
        groups: what is trained; nothing for the frozen model.
        pixels: a batch of 8-bit pixels.
        labels: (B,).
        precision: see `bench.autocast`.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], pixels: Tensor, labels: Tensor, precision: str
    ) -> None:
        self.model, self.groups, self.precision = model, groups, precision
        self.pixels, self.labels = pixels.float() / 255, labels
        self.optimizer = torch.optim.AdamW(groups, fused=True) if groups else None  # as Trainer has it
        # Like the models that are compared, none has dropout, so training mode matters to BatchNorm alone.
        self.call = model

    def compile(self) -> None:
        """Compile the whole model, without a break."""
        self.call = torch.compile(self.model, fullgraph=True)

    def forward(self) -> Tensor:
        """Compute the loss."""
        with bench.autocast(self.precision):
            return F.cross_entropy(self.call(self.pixels).float(), self.labels)

    def backward(self) -> None:
        """Compute the loss and its gradients."""
        self.model.train()
        self.forward().backward()

    def train(self) -> None:
        """Make one training step."""
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def infer(self) -> None:
        """Compute the logits."""
        self.model.eval()
        with torch.inference_mode(), bench.autocast(self.precision):
            self.call(self.pixels)

    def peak(self, step: timing.Step) -> int | None:
        """Return the most memory that is taken in a step, in bytes, the model included; None on a CPU."""
        if bench.DEVICE.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()


def make_runners(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Runner]:
    """Make what is timed of one cell of the table."""
    torch.manual_seed(0)
    torch.compiler.reset()  # of an earlier cell's models, which count towards the limit of compilations
    batch_size = cell["batch_size"]
    # Sixteen at least, which prompts in pixel space start from.
    material = random_material(MODELS[cell["model"]].image_size, max(batch_size, 16))
    pixels, labels = material.splits["train"].pixels[:batch_size], material.splits["train"].labels[:batch_size]
    prompts, library = cell["num_virtual_tokens"], cell["library_size"]
    runners = {}
    for name in cell["methods"]:
        backbone = make_backbone(cell["model"], cell["precision"])
        config = {"library_size": library} | ({"head": "text"} if cell["model"] == "clip-b32" else {})
        arguments = methods.Options(1e-3, prompts, SIDES.get(name, 64), config)
        model, groups = METHODS[name](backbone, material, arguments)
        if cell["model"] == "clip-b32":
            use_texts(model.model, F.normalize(torch.randn(NUM_LABELS, backbone.config.projection_dim), dim=-1))
        runners[name] = Runner(model.to(bench.DEVICE), groups, pixels, labels, cell["precision"])
    for kind in ("vit", "clip") if cell["official"] else ():
        model = official_code.load(options.official, kind, NUM_LABELS, prompts, library)
        adapted = Plain(model.to(bench.DEVICE), material)
        trained = [{"params": [each for each in adapted.parameters() if each.requires_grad], "lr": 1e-3}]
        runners[f"official, {kind}"] = Runner(adapted, trained, pixels, labels, cell["precision"])
    if cell["compiled"]:
        # Beside the same models as they are, so that the ratio is one of the same turns.
        for name, runner in list(runners.items()):
            twin = Runner(runner.model, runner.groups, pixels, labels, cell["precision"])
            twin.compile()
            runners[f"{name}, compiled"] = twin
    return runners


class Plain(methods.Adapted):
    """A model that takes pixels by position and answers with logits alone."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        return self.model(methods.normalize(pixels, *self.scale))


def moved_bytes(runner: Runner, saved: int, training: bool) -> int:
    """Return the bytes that must pass through memory: weights, what is kept for the way back, AdamW's state."""
    weights = sum(parameter.nbytes for parameter in runner.model.parameters())
    if not training:
        return weights
    trained = sum(parameter.nbytes for parameter in runner.model.parameters() if parameter.requires_grad)
    # Gradients are written and read; both moments and the weights are read and written.
    return 2 * weights + 2 * saved + 8 * trained


def measure(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time all methods of a cell."""
    runners = make_runners(cell, options)
    yardsticks, read = timing.yardsticks(cell["precision"])
    training = {name: runner.train for name, runner in runners.items() if runner.optimizer is not None}
    train_seconds = timing.take_turns(training | yardsticks, options.rounds)
    infer_seconds = timing.take_turns({name: runner.infer for name, runner in runners.items()}, options.rounds)
    machine = read(train_seconds)
    measured = {}
    for name, runner in runners.items():
        parameters = list(runner.model.parameters())
        runner.call = runner.model  # counted as it is written, compiled or not
        row = {
            "inference_seconds": statistics.median(infer_seconds[name]),
            "inference_floor": machine.floor(timing.count_flops(runner.infer), moved_bytes(runner, 0, training=False)),
            "inference_peak_bytes": runner.peak(runner.infer),
            "inference_ratios": {other: timing.ratio(infer_seconds, name, other) for other in runners},
            "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
        }
        if name in training:
            saved = timing.count_saved_bytes(runner.forward, parameters)
            flops = timing.count_flops(runner.backward)
            row |= {
                "train_seconds": statistics.median(train_seconds[name]),
                "train_flops": flops,
                "train_floor": machine.floor(flops, moved_bytes(runner, saved, training=True)),
                "saved_bytes": saved,
                "train_peak_bytes": runner.peak(runner.train),
                "train_ratios": {other: timing.ratio(train_seconds, name, other) for other in training},
            }
        measured[name] = row
    return {
        "machine": {"gigaflops": machine.flops / 1e9, "gigabytes_per_second": machine.bandwidth / 1e9},
        "rounds": options.rounds,
        "measured": measured,
    }


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the cells of the table that are asked for."""
    return [
        {
            "benchmark": "step_time",
            "model": model,
            "methods": list(options.methods),
            "official": options.official is not None,
            "precision": precision,
            "compiled": options.compile,
            "batch_size": batch_size,
            "num_virtual_tokens": options.num_virtual_tokens,
            "library_size": options.library_size,
            "threads": torch.get_num_threads(),
        }
        for model in options.models
        for precision in options.precisions
        for batch_size in options.batch_sizes
    ]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in MODELS if name != "smoke"]
    parser.add_argument("--models", nargs="+", choices=real, default=real)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--num_virtual_tokens", type=int, default=16)
    parser.add_argument("--library_size", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="also compile each model as a whole")
    parser.add_argument("--official", metavar="CHECKOUT", help="time the official code too, with --models vit-b32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--results", default="outputs/step_time.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--show", metavar="RESULTS", help="print the tables of a results file and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args(command_line)
    if options.show:
        rows = list(bench.Results(options.show))
        print(*map(step_tables.table, rows), step_tables.summary(rows), sep="\n\n")
        return
    if options.official and options.models != ["vit-b32"]:
        parser.error(f"--official has a ViT-B/32 only, but got --models {' '.join(options.models)}: --models vit-b32")
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
        for cell in cells(options):
            row = results.get(cell, lambda cell=cell: measure(cell, options))
            rows.append(row)
            print(step_tables.table(row), end="\n\n", flush=True)
            if {"pgn", "static"} <= row["measured"].keys():
                ratio = row["measured"]["pgn"]["train_ratios"]["static"]
                print(f"training step, PGN / static prompts: {ratio:.3f}", end="\n\n", flush=True)
        if len(rows) > 1:
            print(step_tables.summary(rows))


if __name__ == "__main__":
    main()
