"""The peak memory of a training step: PGN beside static prompts, VPT-deep, LoRA and full fine-tuning.

    python benchmarks/memory.py --models S/16 B/16 --batch 32
    python benchmarks/memory.py --models B/16 --batch 32 --checkpointing
    python benchmarks/memory.py --largest 24 --ceiling 10
    python benchmarks/memory.py --table --results benchmarks/results/memory.jsonl

Weights and images are random: memory does not depend on them. Every measurement runs in a process of its own. Its peak
is that of two steps after the model is built (the second has the optimizer's moments), as a whole and less what the
process held before the model: the process's anonymous memory on a CPU (Linux), what torch has allocated on a GPU.

`--largest GIB` finds the largest ViT that trains within this much memory, one image at a time and with gradient
checkpointing: `predict` estimates each, and the largest that fits into `--ceiling GIB` is run. Every figure is a line
of JSON in the results file, and is not measured again. `--smoke`: a tiny ViT, offline, in seconds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTForImageClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
import methods
from bench import DEVICE
from sizes import SIZES, Size, random_material

MIB = 2**20
NUM_VIRTUAL_TOKENS = 16
# Freed memory goes back to the system at once, so that a peak is one of tensors and not of the allocator.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


# name -> how the model is built, and the side of what the generator sees
METHODS: dict[str, tuple[Callable[..., methods.Built], int | None]] = {
    "frozen forward": (methods.frozen, None),
    "linear head": (methods.linear, None),
    "static prompts": (methods.static, None),
    "PGN, generator at full size": (methods.pgn, None),
    "PGN, generator at 112 px": (methods.pgn, 112),
    "PGN, generator at 64 px": (methods.pgn, 64),
    "PGN, pixel space": (methods.pgn_pixel, None),
    "PGN, dense": (methods.pgn_dense, 64),
    "VPT-deep": (methods.vpt_deep, None),
    "PGN in every layer, generator at 64 px": (methods.pgn_deep, 64),
    "LoRA, r = 8": (methods.lora, None),
    "full fine-tuning": (methods.full, None),
}
REFERENCE = "static prompts"
LARGEST = ("PGN, generator at 64 px", "LoRA, r = 8", "full fine-tuning")
PROCESS_MIB = 530  # what Python with torch, Transformers and the benchmarks holds before the model, on a CPU


def anonymous() -> float:
    """Return the process's memory that is no file's, in MiB: pages of libraries come and go as the system likes."""
    resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="utf-8").split()[1:3])
    return (resident - shared) * mmap.PAGESIZE / MIB


def now() -> float:
    """Return what is held now, in MiB."""
    return torch.cuda.memory_allocated() / MIB if DEVICE.type == "cuda" else anonymous()


class Peak:
    """The peak of what is held while the context is open, `value` in MiB: torch's own on a GPU, looked at on a CPU.

    A thread looks every millisecond. A training step's peak, at the end of the forward pass, lasts far longer.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.value = max(self.value, anonymous())

    def __enter__(self) -> Peak:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if DEVICE.type == "cuda":
            self.value = torch.cuda.max_memory_allocated() / MIB
        else:
            self._done.set()
            self._thread.join()


def random_vit(size: Size, dtype: torch.dtype) -> ViTForImageClassification:
    """Make a ViT whose weights are noise, without ever holding them in another dtype."""
    with torch.device("meta"):
        model = ViTForImageClassification(size.config()).to(dtype)
    model.to_empty(device=DEVICE)
    noise = (0.02 * torch.randn(2**20)).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
    return model.eval()


def train(model: nn.Module, groups: methods.Groups, pixels: Tensor, labels: Tensor, steps: int) -> None:
    """Train with AdamW as Trainer does: gradients are gone before the next step."""
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(pixels.float() / 255).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(settings: dict[str, Any], steps: int, ceiling: float | None) -> dict[str, Any]:
    """Build and train one model in this process and return its peaks, in MiB."""
    warnings.simplefilter("ignore", FutureWarning)  # Transformers renames gradient checkpointing
    if ceiling is not None and DEVICE.type == "cpu":
        import resource  # not on Windows

        # A request beyond it fails, rather than the machine. The limit counts what is reserved and never touched too.
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        reserved = int(next(line for line in status if line.startswith("VmData")).split()[1]) / 1024 - anonymous()
        resource.setrlimit(resource.RLIMIT_DATA, (int(ceiling * 2**30 + reserved * MIB),) * 2)
    size, (build, generator_image_size) = SIZES[settings["model"]], METHODS[settings["method"]]
    torch.manual_seed(0)
    material = random_material(size.image_size, settings["batch"])
    split = material.splits["train"]
    before = now()
    backbone = random_vit(size, getattr(torch, settings["precision"]))
    numbers = backbone.num_parameters()
    if settings["checkpointing"]:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options = methods.Options(1e-3, NUM_VIRTUAL_TOKENS, generator_image_size, {})
    model, groups = build(backbone, material, options)
    if backbone.classifier.__class__ is nn.Linear:  # PGN's own head takes features of any dtype
        backbone.classifier.to(backbone.dtype)
    built = now()
    with Peak() as peak:
        if groups:
            train(model, groups, split.pixels, split.labels, steps)
        else:
            with torch.inference_mode():
                model(split.pixels.float() / 255)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "parameters": numbers,
        "trained_parameters": trained,
        "before_mib": round(before, 1),
        "built_mib": round(built - before, 1),
        "peak_mib": round(peak.value - before, 1),
        "total_mib": round(peak.value, 1),
        "steps": steps,
    }


def in_own_process(settings: dict[str, Any], steps: int, ceiling: float | None) -> dict[str, Any]:
    """Measure in a new process, which gives everything back and has nothing of an earlier measurement."""
    os.environ |= HONEST
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, settings, steps, ceiling).result()
        except RuntimeError as error:
            # A process that was ended from outside has said nothing of memory, and is no result.
            if isinstance(error, BrokenProcessPool) or "memory" not in str(error):
                raise
            return {"out_of_memory": True, "ceiling_gib": ceiling}


def cell(model: str, method: str, batch: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """Name the settings of a measurement."""
    return {
        "model": model,
        "method": method,
        "batch": batch,
        "precision": precision,
        "checkpointing": checkpointing,
        "prompts": NUM_VIRTUAL_TOKENS,
    }


@cache
def count(model: str) -> int:
    """Return the number of a model's parameters."""
    with torch.device("meta"):
        return ViTForImageClassification(SIZES[model].config()).num_parameters()


def predict(settings: dict[str, Any]) -> float:
    """Predict a peak in MiB, less what the process holds before the model.

    What a layer keeps for the backward pass, of each token: its input, queries, keys, values, the attention's output,
    the MLP's input (6 D) and what its activation function reads (F); what is trained needs its inputs as well
    (9 D + 2 F). The backward pass of one layer takes 2 D + 2 F beside them. With checkpointing the other layers keep
    their inputs (D). Gradients and moments of whatever is trained in full are as large as the weights, three times.
    """
    size, itemsize = SIZES[settings["model"]], getattr(torch, settings["precision"]).itemsize
    full = settings["method"] == "full fine-tuning"
    width, inner = size.hidden_size, size.intermediate_size
    prompts = 0 if full or "LoRA" in settings["method"] else settings["prompts"]
    tokens = settings["batch"] * ((size.image_size // size.patch_size) ** 2 + 1 + prompts)
    kept = 9 * width + 2 * inner if full else 6 * width + inner
    layer = kept + 2 * width + 2 * inner
    activations = layer + (size.layers - 1) * (width if settings["checkpointing"] else kept)
    images = 2 * settings["batch"] * 3 * size.image_size**2 * 4
    weights = count(settings["model"]) * itemsize
    forward = weights * (3 if full else 1) + tokens * activations * itemsize
    backward = weights * 4 + tokens * layer * itemsize if full else 0  # gradients come as activations go
    return (max(forward, backward) + images) / MIB


def largest(results: bench.Results, limit: float, ceiling: float) -> None:
    """Find the largest ViT by method and precision that fits into `limit` GiB, and run what fits into `ceiling`."""
    for precision in "bfloat16", "float32":
        for method in LARGEST:
            cells = [cell(model, method, 1, precision, True) for model in SIZES]
            needs = {one["model"]: (predict(one) + PROCESS_MIB) / 1024 for one in cells}
            fitting = [one for one in cells if needs[one["model"]] <= limit]
            run = [one for one in cells if needs[one["model"]] <= min(ceiling, limit)][-1]
            # Only full fine-tuning has moments that count.
            steps = 2 if method == "full fine-tuning" else 1
            row = results.get(run, lambda run=run, steps=steps: in_own_process(run, steps, ceiling))
            best = fitting[-1]["model"]
            measured = "out of memory" if "total_mib" not in row else f"{row['total_mib'] / 1024:.3f} GiB"
            print(
                f"| {method} | {precision} | {best}, {count(best) / 1e9:.2f} B parameters, predicted "
                f"{needs[best]:.1f} GiB | {run['model']}: {measured}, predicted {needs[run['model']]:.3f} GiB |"
            )


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Write peaks in MiB as a Markdown table, a column for each model and setting; ratios to static prompts."""
    columns: dict[tuple, dict[str, float]] = {}
    for row in rows:
        settings = row["settings"]
        key = tuple(settings[name] for name in ("model", "batch", "precision", "checkpointing"))
        columns.setdefault(key, {})[settings["method"]] = row.get("peak_mib")
    columns = {key: peaks for key, peaks in columns.items() if REFERENCE in peaks}
    heads = [
        f"{model}, batch {batch}, {precision}" + (", checkpointing" if checkpointing else "")
        for model, batch, precision, checkpointing in columns
    ]
    lines = [["method", *heads], ["---"] * (len(columns) + 1)]
    for method in METHODS:
        if any(method in peaks for peaks in columns.values()):
            cells = [
                f"{peaks[method]:,.0f} ({peaks[method] / peaks[REFERENCE]:.3f})" if peaks.get(method) else "-"
                for peaks in columns.values()
            ]
            lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=("S/16", "B/16"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--largest", type=float, metavar="GIB", help="look for the largest ViT that trains in this")
    parser.add_argument("--ceiling", type=float, metavar="GIB", help="what no process may exceed (on a CPU)")
    parser.add_argument("--results", default="outputs/memory.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--table", action="store_true", help="only print the table of the results file")
    parser.add_argument("--smoke", action="store_true", help="a tiny ViT, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            options.models, options.methods, options.batch = ["tiny"], [REFERENCE, "PGN, generator at full size"], 8
            options.results = f"{folder}/memory.jsonl"
        results = bench.Results(options.results)
        if options.largest:
            largest(results, options.largest, options.ceiling or options.largest)
        elif not options.table:
            for model in options.models:
                for method in options.methods:
                    one = cell(model, method, options.batch, options.precision, options.checkpointing)
                    results.get(one, lambda one=one: in_own_process(one, options.steps, options.ceiling))
        if not options.largest:
            print(table(results))


if __name__ == "__main__":
    main()
