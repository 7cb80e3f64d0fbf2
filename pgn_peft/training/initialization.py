"""Initialisation of an adapter from training images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.library import AdditiveLibrary, PatchLibrary
from pgn_peft.nn.preprocessing import denormalize
from pgn_peft.tuner.adapters import find_layer, image_function, without_adapters
from pgn_peft.tuner.encoder_layer import PGNBlock
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.utils.values import filled


@torch.no_grad()
def start_library_from_images(
    model: nn.Module, pixel_values: Tensor, adapter_name: str = "default", seed: int = 0
) -> None:
    """Start the library of an adapter from training images, before it is trained.

    In latent space its entries (static prompts: the prompts themselves) become tokens of random patches, position
    embeddings included, as the frozen backbone computes them; for prompts in several layers, those that enter each
    layer. In pixel space they become random patches. The "dense" layout starts at zero, and is left alone.

    Args:
        model: a model with the adapter. Its mode is left as it is found.
        pixel_values: (B, C, H, W), normalised as for the backbone: up to a few hundred training images.
        adapter_name: the adapter.
        seed: for the random choice of patches.

    Raises:
        ValueError: no adapter has this name, or `pixel_values` has the wrong axes, size or, in pixel space, range.

    Source: Xu et al. 2024 (arXiv:2402.02382) and VIPAMIN (NeurIPS 2025): static prompts that start as tokens of the
    training images need fewer images.
    """
    layer = find_layer(model, adapter_name)
    library, config = layer.library(adapter_name), layer.configs[adapter_name]
    side = layer.projection.kernel_size[0]
    if (
        pixel_values.ndim != 4
        or pixel_values.shape[1] != layer.num_channels
        or min(*pixel_values.shape[2:], len(pixel_values) * side) < side
    ):
        raise ValueError(
            f"`pixel_values` must have the axes (B, {layer.num_channels}, H, W) and measure {side} pixels at least, "
            f"but got {tuple(pixel_values.shape)}. Stack images of one size."
        )
    choice = torch.Generator().manual_seed(seed)
    if isinstance(library, AdditiveLibrary):
        return
    if isinstance(library, PatchLibrary):
        pixels = denormalize(pixel_values.float(), filled(config.image_mean), filled(config.image_std))
        rounding = 1e-3
        if not bool(((pixels >= -rounding) & (pixels <= 1 + rounding)).all()):
            raise ValueError(
                f"`pixel_values` must be normalised with the adapter's `image_mean` and `image_std`, but got pixels "
                f"from {pixels.min().item():g} to {pixels.max().item():g} without that. Use the model's image "
                "processor."
            )
        library.start_from_images(pixels.clamp(0, 1), choice)
        return
    library.start_from_tokens(_patch_tokens(model, layer, filled(config.prompt_depth), pixel_values), choice)


def _patch_tokens(model: nn.Module, layer: PGNLayer, depth: int, pixel_values: Tensor) -> list[Tensor]:
    """Compute the frozen backbone's tokens of patches: (M, D) for each of the first layers, in the same order."""
    entering: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, inputs: Any, output: Any = None) -> None:
        # What the embeddings return, which a tuple may begin with; what a layer takes.
        tokens = inputs[0] if output is None else output
        entering[index] = tokens[0] if isinstance(tokens, tuple) else tokens

    blocks = [module for module in model.modules() if isinstance(module, PGNBlock) and 0 < module.index < depth]
    # Before the first layer prompts are appended to the embeddings, which CLIP normalises after that.
    hooks = [layer.base_layer.register_forward_hook(partial(keep, 0))]
    hooks += [block.register_forward_pre_hook(partial(keep, block.index)) for block in blocks]
    height, width = pixel_values.shape[2:]
    try:
        with without_adapters(model):
            device = layer.projection.weight.device
            image_function(model)(pixel_values=pixel_values.to(device), **layer.size_options((height, width)))
    finally:
        for hook in hooks:
            hook.remove()
    sides = layer.projection.kernel_size
    patches = (height // sides[0]) * (width // sides[1])
    # Patches come last, after CLS and registers; timm's may still lie in rows and columns.
    return [entering[index].flatten(1, -2)[:, -patches:].flatten(0, 1) for index in range(depth)]
