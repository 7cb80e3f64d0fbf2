"""The peak memory of a training step: PGN beside static prompts, VPT-deep, LoRA and full fine-tuning.

    python benchmarks/memory.py --models S/16 B/16 --batch 32
    python benchmarks/memory.py --models B/16 --batch 8 --checkpointing
    python benchmarks/memory.py --table --results benchmarks/results/memory.jsonl

Weights and images are random: memory does not depend on them. Every measurement runs in a process of its own. Its peak
is that of two steps after the model is built (the second has the optimizer's moments), as a whole and less what the
process held before the model: the process's anonymous memory on a CPU (Linux), what torch has allocated on a GPU.

Every figure is a line of JSON in the results file, and is not measured again. `--smoke`: a tiny ViT, offline, in
seconds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench
import methods
import timing
import torch
from bench import DEVICE
from torch import nn
from transformers import ViTForImageClassification

MIB = 2**20
NUM_VIRTUAL_TOKENS = 16
# Freed memory goes back to the system at once, so that a peak is one of tensors and not of the allocator.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
REFERENCE = "static"


def anonymous() -> float:
    """Return the process's memory that belongs to no file, in MiB: the system loads and drops pages of libraries."""
    resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="utf-8").split()[1:3])
    return (resident - shared) * mmap.PAGESIZE / MIB


def now() -> float:
    """Return the memory in use now, in MiB."""
    return torch.cuda.memory_allocated() / MIB if DEVICE.type == "cuda" else anonymous()


class Peak:
    """The most memory in use while the context is open, `value` in MiB: torch's own on a GPU, sampled on a CPU.

    A thread samples every millisecond. A training step's peak, at the end of the forward pass, lasts far longer.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
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


def random_vit(size: str, dtype: torch.dtype) -> ViTForImageClassification:
    """Make a ViT whose weights are noise, without a copy of them in another dtype."""
    with torch.device("meta"):
        model = ViTForImageClassification(timing.SIZES[size]).to(dtype)
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def measure(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Build and train one model in this process and return its peaks, in MiB."""
    warnings.simplefilter("ignore", FutureWarning)  # Transformers renames gradient checkpointing
    torch.manual_seed(0)
    material = timing.random_material(timing.SIZES[settings["model"]].image_size, settings["batch"])
    before = now()
    backbone = random_vit(settings["model"], getattr(torch, settings["precision"]))
    numbers = backbone.num_parameters()
    if settings["checkpointing"]:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, groups = methods.build_measured(settings["method"], backbone, material, settings["prompts"], {})
    if backbone.classifier.__class__ is nn.Linear:  # PGN's own head takes features of any dtype
        backbone.classifier.to(backbone.dtype)
    built = now()
    runner = timing.Runner(model, groups, material.splits["train"], "float32")
    with Peak() as peak:
        for _ in range(steps):
            runner.train() if groups else runner.infer()
    return {
        "parameters": numbers,
        "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "before_mib": round(before, 1),
        "built_mib": round(built - before, 1),
        "peak_mib": round(peak.value - before, 1),
        "total_mib": round(peak.value, 1),
        "steps": steps,
    }


def in_own_process(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measure in a new process, in which no memory of earlier measurements is left."""
    os.environ |= ALLOCATOR
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, settings, steps).result()


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Write peaks in MiB, a column for each model and setting; in brackets ratios to static prompts."""
    columns: dict[str, dict[str, float]] = {}
    for row in rows:
        settings = row["settings"]
        title = "{model}, batch {batch}, {precision}".format(**settings)
        title += ", checkpointing" if settings["checkpointing"] else ""
        columns.setdefault(title, {})[settings["method"]] = row.get("peak_mib")
    columns = {title: peaks for title, peaks in columns.items() if REFERENCE in peaks}
    lines = [["method", *columns]]
    for method in dict.fromkeys([*methods.MEASURED, *(method for peaks in columns.values() for method in peaks)]):
        if any(method in peaks for peaks in columns.values()):
            cells = [
                f"{peaks[method]:,.0f} ({peaks[method] / max(peaks[REFERENCE], 1e-9):.3f})"
                if peaks.get(method)
                else "-"
                for peaks in columns.values()
            ]
            lines.append([method, *cells])
    return bench.markdown(lines)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=timing.SIZES, default=("S/16", "B/16"))
    parser.add_argument("--methods", nargs="+", choices=methods.MEASURED, default=tuple(methods.MEASURED))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--results", default="outputs/memory.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--table", action="store_true", help="only print the table of the results file")
    parser.add_argument("--smoke", action="store_true", help="a tiny ViT, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            options.models, options.methods, options.batch = ["tiny"], [REFERENCE, "pgn"], 8
            options.results = f"{folder}/memory.jsonl"
        results = bench.Results(options.results)
        for model in () if options.table else options.models:
            for method in options.methods:
                settings = {
                    "model": model,
                    "method": method,
                    "batch": options.batch,
                    "precision": options.precision,
                    "checkpointing": options.checkpointing,
                    "prompts": NUM_VIRTUAL_TOKENS,
                }
                results.get(settings, lambda settings=settings: in_own_process(settings, options.steps))
        print(table(results))


if __name__ == "__main__":
    main()
