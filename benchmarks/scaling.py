"""Training images per second in one process and in two that train together, on CPUs, one thread each.

    python benchmarks/scaling.py --model path/to/deit-tiny-patch16-224 --results benchmarks/results/scaling.jsonl

`AdapterTrainer` under `accelerate launch`, as the training script uses it, on random images of `--side` pixels that
lie in memory: no decoding, no augmentation. Each process takes `--batch_size` images per step, so two take twice as
many. The three arrangements alternate, `--rounds` times, and medians are compared:

- one process;
- two together: DistributedDataParallel over gloo;
- two apart: two runs of one process at once, without communication. Their loss is the machine's: caches, memory,
  clock.

The first `--warm_up` steps of a run are not counted. An all-reduce of as many bytes as the gradients have is timed
after the run by itself; in training, part of it overlaps with the backward pass. Rows that are in the file are not
measured again. The machine must be otherwise idle. `--smoke`: a tiny model, in seconds; it ends with

    efficiency of two processes 0.850
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed
from transformers import AutoModelForImageClassification, TrainerCallback, TrainerControl, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from image_data import smoke_arguments

from pgn_peft import AdapterTrainer, ImageCollator, PGNConfig
from pgn_peft.training import EqualStatistics

CONFIG = Path(__file__).parents[1] / "examples/accelerate/cpu_two_processes.yaml"
CLASSES = 10
ARRANGEMENTS = {"one": (1, 1), "together": (1, 2), "apart": (2, 1)}  # launches, processes of each


class Clock(TrainerCallback):
    """Writes down when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())


def all_reduce_seconds(numbers: int, repetitions: int = 20) -> float:
    """Return the median time of summing float32 numbers over all processes."""
    if not distributed.is_initialized():
        return 0.0
    tensor, spent = torch.zeros(numbers), []
    for _ in range(repetitions):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(tensor)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def train(options: argparse.Namespace) -> None:
    """Train in this process, one of those that were launched; the first of them writes `options.report`."""
    torch.manual_seed(0)
    backbone = AutoModelForImageClassification.from_pretrained(options.model)
    model = get_peft_model(backbone, PGNConfig(num_labels=CLASSES, generator_image_size=None))
    rows = [
        {"pixel_values": torch.randn(3, options.side, options.side), "labels": index % CLASSES} for index in range(100)
    ]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    steps = options.warm_up + options.steps
    rows *= -(-steps * options.batch_size * processes // len(rows))  # one epoch, which ends with the run
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = AdapterTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=ImageCollator(CLASSES, interpolate_pos_encoding=options.side != backbone.config.image_size),
            callbacks=[EqualStatistics(), clock],
        )
        trainer.train()
        trainable, _ = model.get_nb_trainable_parameters()
        seconds = clock.ends[-1] - clock.ends[options.warm_up - 1]
        report = {
            "images_per_second": options.steps * options.batch_size * processes / seconds,
            "step_milliseconds": 1000 * seconds / options.steps,
            "gradient_bytes": 4 * trainable,
            "all_reduce_milliseconds": 1000 * all_reduce_seconds(trainable),
        }
        if trainer.is_world_process_zero():
            Path(options.report).write_text(json.dumps(report), encoding="utf-8")


def measure(arrangement: str, options: argparse.Namespace) -> dict[str, float]:
    """Launch the processes of an arrangement, and put together what they report."""
    launches, processes = ARRANGEMENTS[arrangement]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if processes > 1:
        launcher += ["--config_file", str(CONFIG)]
    else:
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    sizes = [f"--{name}={getattr(options, name)}" for name in ("model", "side", "batch_size", "steps", "warm_up")]
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{index}.json") for index in range(launches)]
        running = [
            subprocess.Popen(
                [*launcher, __file__, *sizes, f"--report={report}"], env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            for report in reports
        ]
        if any([process.wait() for process in running]):  # all of them, before the folder goes
            raise SystemExit(f"`{arrangement}` must run to its end, but got an error. It is above.")
        found = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    return found[0] | {"images_per_second": sum(report["images_per_second"] for report in found)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of all arrangements, and the efficiency of two processes in words."""
    rates = {
        name: [row["images_per_second"] for row in rows if row["settings"]["arrangement"] == name]
        for name in ARRANGEMENTS
    }
    one = statistics.median(rates["one"])
    lines = ["| processes | images/s, median (lowest to highest) | of one process | efficiency |", "|---|---|---|---|"]
    for name, values in rates.items():
        rate, of_one = statistics.median(values), statistics.median(values) / one
        processes = ARRANGEMENTS[name][0] * ARRANGEMENTS[name][1]
        lines.append(
            f"| {'' if name == 'one' else 'two '}{name} | {rate:.1f} ({min(values):.1f} to {max(values):.1f}) "
            f"| {of_one:.2f} | {of_one / processes:.2f} |"
        )
    together = [row for row in rows if row["settings"]["arrangement"] == "together"]
    step, sent = (
        statistics.median(row[f"{name}_milliseconds"] for row in together) for name in ("step", "all_reduce")
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{together[0]['gradient_bytes']:,} bytes of gradients a step; an all-reduce of them by itself takes "
            f"{sent:.2f} ms, {sent / step:.1%} of a step of {step:.1f} ms.",
            "",
            f"efficiency of two processes {statistics.median(rates['together']) / one / 2:.3f}",
        ]
    )


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--batch_size", type=int, default=25, help="images a step, of each process")
    parser.add_argument("--steps", type=int, default=40, help="that are measured")
    parser.add_argument("--warm_up", type=int, default=5, help="steps before them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="outputs/scaling.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--report", help=argparse.SUPPRESS)  # a launched process
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round, in seconds")
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.model, options.side, options.results = f"{folder}/vit", 32, f"{folder}/results.jsonl"
            options.rounds, options.steps, options.warm_up = 1, 10, 2
        if not options.model:
            parser.error("--model is required")
        if options.report:
            train(options)
            return
        import bench  # not in the processes that are timed, which would wait for its imports

        results, rows = bench.Results(options.results), []
        for index in range(options.rounds):
            for arrangement in ARRANGEMENTS:
                settings = {"arrangement": arrangement, "round": index, "model": Path(options.model).name}
                settings |= {name: getattr(options, name) for name in ("side", "batch_size", "steps", "warm_up")}
                rows.append(results.get(settings, lambda name=arrangement: measure(name, options)))
        print(table(rows))


if __name__ == "__main__":
    main()
