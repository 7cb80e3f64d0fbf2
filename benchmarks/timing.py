"""Comparable times: steps that take turns in one process, their ratios round by round, and their lower bounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench import DEVICE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(steps: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time steps in turn, so that what else the machine does meets all of them alike.

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


def count_flops(step: Step) -> int:
    """Return the floating-point operations of a step's products and convolutions, those going back included."""
    # Fused attention is not counted on every device; its plain form is, and is the same work.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def count_saved_bytes(step: Step, parameters: list[Tensor]) -> int:
    """Return the bytes that a step keeps on its way forward for the way back, parameters left out."""
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


@dataclass(frozen=True)
class Machine:
    """What the hardware can do, measured.

    Args:
        flops: floating-point operations a second in a large product of matrices.
        bandwidth: bytes a second, read and written, in a large copy.
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, moved: float) -> float:
        """Return the seconds that a step takes at least: its operations or its bytes, whichever take longer."""
        return max(flops / self.flops, moved / self.bandwidth)


def yardsticks(precision: str) -> tuple[dict[str, Step], Callable[[dict[str, list[float]]], Machine]]:
    """Return steps that measure the machine, and what makes a `Machine` of their times."""
    side, dtype = (8192 if DEVICE.type == "cuda" else 1536), getattr(torch, precision)
    left, right = torch.randn(2, side, side, device=DEVICE).to(dtype)
    source = torch.ones(2**26, device=DEVICE)
    target = torch.empty_like(source)

    def read(seconds: dict[str, list[float]]) -> Machine:
        product, copy = (min(seconds[name]) for name in ("product", "copy"))
        return Machine(2 * side**3 / product, 2 * source.nbytes / copy)

    return {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, read
