"""Time and saved activations of a step; models of random weights to measure them on.

Steps take turns in one process, and ratios are taken turn by turn, so that a busy machine affects all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import DEVICE, Material, Split, autocast
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig

from pgn_peft.nn.preprocessing import Preprocessing

Step = Callable[[], object]
NUM_LABELS = 10


def vit_config(hidden_size: int, heads: int, patch_size: int, layers: int = 12, image_size: int = 224) -> ViTConfig:
    """Return the config of a ViT whose MLPs are four times as wide as its tokens; sides in pixels."""
    return ViTConfig(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        patch_size=patch_size,
        num_hidden_layers=layers,
        image_size=image_size,
        num_labels=NUM_LABELS,
    )


SIZES = {
    "tiny": vit_config(32, 2, 8, layers=2, image_size=32),
    "Ti/16": vit_config(192, 3, 16),
    "S/16": vit_config(384, 6, 16),
    "S/14": vit_config(384, 6, 14),
    "B/32": vit_config(768, 12, 32),
    "B/16": vit_config(768, 12, 16),
}


def random_material(side: int, count: int) -> Material:
    """Make images of noise, with labels in turn, as a data set's training images."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=DEVICE)
    split = Split(pixels, torch.arange(count, device=DEVICE) % NUM_LABELS)
    names = [f"class {index}" for index in range(NUM_LABELS)]
    return Material({"train": split}, names, Preprocessing((0.5,) * 3, (0.5,) * 3, (side, side)), None)


class Runner:
    """One method on one model: its training step and its inference.

    Args:
        model: pixels (B, C, H, W) in [0, 1] to logits.
        groups: what is trained; nothing for the frozen model.
        split: a batch.
        precision: see `bench.autocast`.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], split: Split, precision: str) -> None:
        self.model, self.groups, self.split, self.precision = model, groups, split, precision
        self.pixels = split.pixels.float() / 255
        self.optimizer = torch.optim.AdamW(groups, fused=True) if groups else None  # as Trainer has it
        self.call = model

    def compiled(self) -> Runner:
        """Return a runner of the same model, compiled as a whole."""
        twin = Runner(self.model, self.groups, self.split, self.precision)
        twin.call = torch.compile(self.model, fullgraph=True)
        return twin

    def forward(self) -> Tensor:
        """Compute the loss."""
        with autocast(self.precision):
            return F.cross_entropy(self.call(self.pixels).float(), self.split.labels)

    def backward(self) -> None:
        """Compute the loss and its gradients."""
        self.model.train()
        self.forward().backward()

    def train(self) -> None:
        """Make one training step; no gradients are left, as in Trainer."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> None:
        """Compute the logits."""
        self.model.eval()
        with torch.inference_mode(), autocast(self.precision):
            self.call(self.pixels)


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(steps: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time steps in turn.

    Args:
        steps: by name.
        rounds: how often each is timed; every other round in reverse.
        warm_up: rounds before that are not counted.

    Returns:
        Seconds, by name and round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of one step's time divided by another's."""
    return statistics.median(own / other for own, other in zip(seconds[name], seconds[reference], strict=True))


def count_saved_bytes(step: Step, parameters: list[Tensor]) -> int:
    """Return the bytes of the activations that a step saves for its backward pass, parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())
