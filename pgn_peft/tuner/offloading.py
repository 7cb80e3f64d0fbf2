"""Weights that Accelerate keeps on a disk or in the CPU's memory until their module is called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import align_module_device
from torch import nn


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of a module (`device_map` with "disk" or "cpu"), to read them without calling it."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def loaded_copy(module: nn.Module) -> nn.Module:
    """Copy a module with all its weights in memory."""
    with loaded(module):
        copied = copy.deepcopy(module)
    remove_hook_from_submodules(copied)
    return copied
