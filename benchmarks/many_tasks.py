"""Many tasks on one backbone: weights in memory and throughput of a mixed batch.

    python benchmarks/many_tasks.py --tasks 10

A batch has the same number of images for each task. Compared are one frozen backbone with a PGN adapter for each task
(`adapter_names`), the same with static prompts, with LoRA adapters (PEFT's own mixed batches), and a fine-tuned copy
of the backbone for each task, which answers its images alone. All take turns in one process; throughput is relative to
the frozen backbone, which answers the batch without adapters. A ViT-S/16 of random weights at 224 px, its own head for
all tasks. `--smoke`: a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from bench import DEVICE
from timing import ratio, take_turns
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from pgn_peft import PGNConfig

SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LEAN = {"generator_width": 4, "generator_rank": 8, "library_size": 32}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "static prompts": lambda: PGNConfig(head="frozen", generator="static"),
    "PGN": lambda: PGNConfig(head="frozen"),
    "PGN, lean": lambda: PGNConfig(head="frozen", **LEAN),
    "LoRA, r = 8": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
}


def weights(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, shared ones counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensors.values())


def adapt(backbone: nn.Module, make: Callable[[], PeftConfig], tasks: int) -> nn.Module:
    """Give a copy of the backbone an adapter for each task."""
    model = get_peft_model(copy.deepcopy(backbone), make(), adapter_name="task0")
    for index in range(1, tasks):
        model.add_adapter(f"task{index}", make())
    return model.eval()


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--images", type=int, default=2, help="of each task in a batch")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    options = parser.parse_args(command_line)
    torch.manual_seed(0)
    backbone = ViTForImageClassification(ViTConfig(**(TINY if options.smoke else SIZES))).eval().to(DEVICE)
    images = torch.randn(options.tasks * options.images, 3, 224, 224, device=DEVICE)
    names = [f"task{index}" for index in range(options.tasks) for _ in range(options.images)]
    models = {name: adapt(backbone, make, options.tasks) for name, make in CONFIGS.items()}
    copies = nn.ModuleList(copy.deepcopy(backbone) for _ in range(options.tasks))
    steps: dict[str, Callable[[], object]] = {"frozen model": lambda: backbone(images)}
    for name, model in models.items():
        steps[name] = lambda model=model: model(pixel_values=images, adapter_names=names)
    parts = images.split(options.images)
    steps["fine-tuned copies"] = lambda: [own(part) for own, part in zip(copies, parts, strict=True)]
    with torch.inference_mode():
        seconds = take_turns(steps, options.rounds)
    print("| | weights in memory, MiB | throughput / frozen model |\n|---|---|---|")
    for name in steps:
        holds = copies if name == "fine-tuned copies" else models.get(name, backbone)
        print(f"| {name} | {weights(holds) / 2**20:,.1f} | {ratio(seconds, 'frozen model', name):.2f} |")


if __name__ == "__main__":
    main()
