"""Inspection of an adapted model: mixing coefficients, library, attention to prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.functional import evaluating
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.tuner.adapters import find_layer, image_function, own_logits, prompt_layer
from pgn_peft.tuner.embeddings import has_class_token
from pgn_peft.tuner.head import find_head
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.utils import not_none


@torch.no_grad()
def mixing_coefficients(
    model: nn.Module, pixel_values: Tensor, adapter_name: str = "default", batch_size: int = 64
) -> Tensor:
    """Compute the mixing coefficients of images.

    Args:
        model: a model with the adapter, in any mode; the generator runs in eval mode.
        pixel_values: (B, C, H, W), normalised as for the backbone.
        adapter_name: the adapter.
        batch_size: number of images at a time.

    Returns:
        (B, P, L) coefficients in float32 on the CPU, the same for all layers that have prompts of their own.

    Raises:
        ValueError: no adapter has this name, or its prompts are static.
    """
    layer = find_layer(model, adapter_name)
    generator = _generator(layer, adapter_name)
    device = next(generator.parameters()).device
    with evaluating(generator):
        parts = [generator(part.to(device)).float().cpu() for part in pixel_values.split(batch_size)]
    return torch.cat(parts)


def _generator(layer: PGNLayer, adapter_name: str) -> nn.Module:
    generator = layer.generator(adapter_name)
    if generator is None:
        raise ValueError(f"The adapter {adapter_name!r} has static prompts: no generator mixes them for each image.")
    return generator


@contextmanager
def shuffled_prompts(model: nn.Module, adapter_name: str = "default") -> Iterator[None]:
    """Give each image the prompts that were generated for the previous image.

    The drop in accuracy measures the gain over using another image's prompts. Evaluate in random order: in a data set
    that is sorted by class, the previous image has the same class. The first image gets the prompts of the last one in
    its batch.

    Args:
        model: a model with the adapter.
        adapter_name: the adapter.

    Raises:
        ValueError: no adapter has this name, or its prompts are static.
    """
    generator = _generator(find_layer(model, adapter_name), adapter_name)
    last: list[Tensor] = []

    def shift(_: nn.Module, inputs: Any, coefficients: Tensor) -> Tensor:
        before = last.pop() if last else coefficients[-1:]
        last.append(coefficients[-1:])
        return torch.cat([before, coefficients[:-1]])

    hook = generator.register_forward_hook(shift)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def attention_to_prompts(model: nn.Module, pixel_values: Tensor, adapter_name: str = "default") -> Tensor:
    """Measure the share of the CLS token's attention that goes to each prompt, in each layer of the backbone.

    Args:
        model: a model with the adapter, which must be the only active one. The call uses eager attention, because
            fused attention returns no weights.
        pixel_values: (B, C, H, W), normalised as for the backbone.
        adapter_name: the adapter.

    Returns:
        (B, number of layers, P) shares of attention, averaged over the heads, in float32 on the CPU.

    Raises:
        ValueError: no adapter has this name, it is not the only active one, its prompts are not tokens, or the
            backbone has no CLS token or does not return its attention.
    """
    layer = find_layer(model, adapter_name)
    config = layer.configs[adapter_name]
    base: Any = getattr(model, "get_base_model", lambda: model)()
    active = [] if layer.disable_adapters else list(layer.active_adapters)
    if active != [adapter_name] or config.prompt_space == "pixel" or not has_class_token(layer):
        raise ValueError(
            f"Attention is measured from CLS to the prompts in latent space of the only active adapter. Here {active} "
            f"are active on a {type(base).__name__}, and {adapter_name!r} has prompts in {config.prompt_space} space. "
            "Call set_adapter, or use mixing_coefficients instead."
        )
    before = base.config._attn_implementation
    options = layer.size_options((pixel_values.shape[2], pixel_values.shape[3]))
    compute = image_function(model)
    with evaluating(model):
        try:
            base.set_attn_implementation("eager")
            attentions = compute(pixel_values=pixel_values, output_attentions=True, **options).attentions
        finally:
            base.set_attn_implementation(before)
    if not attentions or any(weights is None for weights in attentions):
        raise ValueError(
            f"This {type(base).__name__} does not return its attention, which is fixed as {before!r}. Load it with "
            "attn_implementation='eager'."
        )
    # Each (B, heads, tokens, tokens). CLS is token 0, and prompts are the last tokens.
    number = not_none(config.num_virtual_tokens)
    return torch.stack([weights[:, :, 0, -number:].mean(dim=1) for weights in attentions], dim=1).float().cpu()


def base_predictions(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Compute the frozen model's own predictions, without prompts and over its own classes.

    Args:
        model: a model with adapters.
        pixel_values: (B, C, H, W), normalised as for the backbone.

    Returns:
        Probabilities (B, M) in float32 on the CPU, and the names of the M classes.

    Raises:
        TypeError: the model carries no adapter.
        ValueError: the model has no classes of its own.
    """
    prompt_layer(model)
    head = find_head(model)
    if head is None or not head.base_labels.id2label:
        raise ValueError(f"This {type(model).__name__} has no classes of its own. Use the adapter's predictions only.")
    return own_logits(model, pixel_values).softmax(-1).cpu(), dict(head.base_labels.id2label)


def library_tokens(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """Return an adapter's library, on the CPU.

    Returns:
        Tokens (L, D); with prompts in several layers (depth, L, D); in pixel space changes of patches (L, C, p, p).
    """
    library = find_layer(model, adapter_name).library(adapter_name)
    tensor = library.tokens if isinstance(library, TokenLibrary) else library.patches
    return tensor.detach().float().cpu()


def usage_by_class(coefficients: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Average the use of each library entry over the images of each class.

    Args:
        coefficients: (B, P, L).
        labels: (B,) classes, 0 to `num_labels` - 1.
        num_labels: number of classes.

    Returns:
        (num_labels, L): mean over the images of a class and over their prompts; rows of absent classes are zero.
    """
    use = coefficients.mean(dim=1)  # (B, L)
    sums = torch.zeros(num_labels, use.shape[1], dtype=use.dtype).index_add_(0, labels.long(), use)
    counts = torch.bincount(labels.long(), minlength=num_labels).clamp(min=1)
    return sums / counts[:, None]
