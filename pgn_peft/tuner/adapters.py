"""An adapter in a model, added by PEFT or by Transformers: name, configuration, tensors, number of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from pgn_peft.nn.functional import evaluating
from pgn_peft.tuner.backbones import SUPPORTED, architecture_of
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.head import find_head
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.tuner.tuner_layer import PGNTunerLayer

# What PEFT puts before the names of tensors in a file.
PREFIX = "base_model.model."


def unwrap(model: Any) -> Any:
    """Return the model inside the wrappers of `torch.compile`, DistributedDataParallel and the like."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def prompt_layer(model: Any) -> PGNLayer:
    """Find the layer that adds the prompts.

    Raises:
        TypeError: the model carries no PGN adapter.
    """
    layer = None
    if isinstance(model, nn.Module):
        layer = next((module for module in model.modules() if isinstance(module, PGNLayer)), None)
    if layer is None:
        raise TypeError(
            f"This {type(model).__name__} carries no PGN adapter. Make one by get_peft_model(model, PGNConfig(...)), "
            "or load one by load_classifier(adapter_id)."
        )
    return layer


def find_layer(model: nn.Module, adapter_name: str = "default") -> PGNLayer:
    """Find the layer of a model that holds an adapter.

    Args:
        model: a model with PGN adapters, made by PEFT or by Transformers' own loaders.
        adapter_name: the adapter.

    Raises:
        TypeError: the model carries no adapter.
        ValueError: no adapter has this name.
    """
    layer = prompt_layer(model)
    if adapter_name not in layer.configs:
        raise ValueError(f"No adapter is called {adapter_name!r}. There are {', '.join(layer.configs) or 'none'}.")
    return layer


def image_function(model: Any) -> Callable[..., Any]:
    """Return what computes a model's output for images: the model, or a method of one that takes texts too."""
    model = unwrap(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = SUPPORTED.get(architecture_of(base) or "")
    if backbone is None or backbone.image_method is None:
        return cast("Callable[..., Any]", model)
    return cast("Callable[..., Any]", getattr(base, backbone.image_method))


def active_adapter(model: Any) -> tuple[str, PGNConfig]:
    """Return name and configuration (a copy, as it is saved) of the active adapter, the first if there are several.

    Raises:
        TypeError: the model carries no PGN adapter.
        ValueError: all adapters have been deleted.
    """
    active = prompt_layer(model).active_adapters
    model = unwrap(model)
    if not active or active[0] not in model.peft_config:
        raise ValueError("No adapter is active: all have been deleted.")
    head = find_head(model)
    if head is not None:
        head.record_labels()
    config = copy.copy(model.peft_config[active[0]])
    config.inference_mode = True
    # PEFT records this for a model's first adapter only.
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return active[0], config


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors, contiguous, under their names in PEFT's files."""
    tensors = get_peft_model_state_dict(unwrap(model), adapter_name=adapter_name, save_embedding_layers=False)
    # In a model that PEFT has not wrapped the names lack the prefix.
    return {PREFIX + name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in tensors.items()}


def num_parameters(model: nn.Module, adapter_name: str) -> int:
    """Count an adapter's parameters, frozen or not; BatchNorm's statistics are not counted."""
    trained: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, PGNTunerLayer):
            trained += module.adapter_modules(adapter_name).values()
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            trained.append(module.modules_to_save[adapter_name])
    return sum(parameter.numel() for module in trained for parameter in module.parameters())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Turn adapters and dropout off. Unlike PEFT's own switch, this keeps `requires_grad`."""
    layers = [module for module in model.modules() if isinstance(module, PGNTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    with evaluating(model):
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled


@torch.inference_mode()
def own_logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Compute what the model answers without adapters.

    Args:
        model: a model with adapters.
        pixel_values: (B, C, H, W), normalised as for the backbone.

    Returns:
        Logits (B, M) of the model's own classes, in float32.

    Raises:
        TypeError: the model carries no PGN adapter.
    """
    options = prompt_layer(model).size_options((pixel_values.shape[2], pixel_values.shape[3]))
    with without_adapters(model):
        return image_function(model)(pixel_values=pixel_values, **options).logits.float().clone()
