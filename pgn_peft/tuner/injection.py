"""All checks before an adapter is added, so that an error leaves the model unchanged."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.tuner.backbones import HEAD, SUPPORTED, Backbone, architecture_of, find_backbone, find_layers
from pgn_peft.tuner.batch_adapters import BASE
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.encoder_layer import PGNBlock
from pgn_peft.tuner.fields import refuse_head_in_modules_to_save
from pgn_peft.tuner.head import PGNHead
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.tuner.readout import check_can_classify
from pgn_peft.tuner.recorded_fields import has_own_head, record_base, record_depth, record_labels
from pgn_peft.tuner.saved_weights import check_size
from pgn_peft.tuner.timm_positions import check_timm
from pgn_peft.tuner.tuner_layer import PGNTunerLayer


@dataclass(frozen=True)
class Injection:
    """An adapter that is about to be added, and the modules of the model that it wraps.

    Args:
        config: the adapter's, complete, with everything that it records of the model.
        backbone: where the model's embeddings and its head are.
        layers: names of the encoder layers after which prompts change or are cut off.
        is_loaded: the config was saved with an adapter, whose tensors are loaded next.
    """

    config: PGNConfig
    backbone: Backbone
    layers: tuple[str, ...]
    is_loaded: bool

    @property
    def targets(self) -> set[str | None]:
        """Names of the modules to wrap."""
        return {self.backbone.embeddings, self.head, *self.layers}

    @property
    def head(self) -> str | None:
        """Name of the classification head: the model's, or the one that it gets; None for features."""
        return HEAD if self.adds_head else self.backbone.head

    @property
    def adds_head(self) -> bool:
        """Whether the adapter brings a head to a model that has none."""
        return self.backbone.head is None and self.config.num_labels is not None

    def cuts_prompts_after(self, layer: str) -> bool:
        """Whether the prompts end after this layer, because the classifier reads all tokens."""
        return self.backbone.reads_all and layer == self.layers[-1]


def plan_injection(model: nn.Module, config: PGNConfig, adapter_name: str) -> Injection:
    """Check an adapter against a model, and fill the open fields of its config.

    Args:
        model: the model that is adapted; not changed.
        config: the adapter's. A new adapter gets a copy, so that one config can serve several models. A config that an
            adapter is loaded with (`inference_mode`), or that has nothing left to record, is completed in place and
            stays the caller's object, as PEFT's loaders promise.
        adapter_name: the adapter's name.

    Raises:
        TypeError: the architecture is not supported, or a field has the wrong type.
        ValueError: the config does not fit the model, or the name cannot be used.
    """
    completed = copy.deepcopy(config)
    completed.validate()
    is_loaded = completed.inference_mode and completed.hidden_size is not None
    check_origin(completed, model)
    backbone = find_backbone(model, cast("list[str] | None", completed.target_modules))
    if backbone.carries:
        check_timm(model.get_submodule(backbone.embeddings.rpartition(".")[0]))
    if backbone.head is None and has_own_head(completed):
        check_can_classify(model)
    check_offloading(completed, model, backbone)
    check_adapter_name(adapter_name, model)
    layers = _find_wrapped_layers(model, completed, backbone)
    check_modules_to_save(completed, model, backbone, layers)
    record_base(completed, model, backbone)
    if completed.prompt_depth != 1:
        record_depth(completed, model, layers)
    record_labels(completed, model, backbone)
    check_size(completed)
    if config.inference_mode or config == completed:
        vars(config).update(vars(completed))
        completed = config
    return Injection(completed, backbone, tuple(layers), is_loaded)


def _find_wrapped_layers(model: nn.Module, config: PGNConfig, backbone: Backbone) -> list[str]:
    """Name the layers after which the adapter's prompts change or are cut off."""
    if config.prompt_depth == 1 and not backbone.reads_all:
        return []
    layers = find_layers(model, backbone.embeddings)
    return layers[-1:] if config.prompt_depth == 1 else layers


def refuse_other_adapters(model: nn.Module) -> None:
    """Refuse a model that PEFT has wrapped, or that carries adapters of another method.

    Raises:
        ValueError: the model is a `PeftModel`, or carries adapters of another method.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "`model` must be a plain model, but got a PeftModel. Use model.add_adapter(name, config) for a further "
            "PGN adapter, or pass model.unload() to start from the plain model."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PGNTunerLayer):
            raise ValueError(
                f"`model` must carry no adapters of another method, but got {type(module).__module__} at {name!r}. "
                "PGN and another method on one model are not supported: their saved files would mix. Remove it first."
            )


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuse a name that cannot be a folder's, or that PEFT could mistake for a part of a tensor's name.

    Raises:
        ValueError: the name is too long, has characters that a folder's name cannot have, or is part of a module's.
    """
    # PEFT saves an adapter in a folder of its name, which "../other" would put elsewhere.
    if len(adapter_name) > 100 or not adapter_name.isprintable() or set(adapter_name) & set('/\\:*?"<>|'):
        raise ValueError(
            f"`adapter_name` must be a name for a folder, but got {adapter_name!r}: PEFT saves the adapter there. "
            "Use letters and digits."
        )
    # PEFT tells adapters apart by looking for their names between the dots of tensor names.
    with torch.device("meta"):
        own = (
            *PromptGenerator(1, 1).state_dict(),
            *PromptGenerator(1, 1, rank=1).state_dict(),
            *TokenLibrary(1, 1, num_slots=1).state_dict(),
        )
    containers = (*PGNLayer.adapter_layer_names, *PGNHead.adapter_layer_names)
    base = (name.partition(".pgn_")[0] for name, _ in model.named_modules())
    parts = {part for name in (*own, *base, "base_model.model.base_layer", *containers) for part in name.split(".")}
    parts |= {BASE, HEAD}  # the first names the model without an adapter
    # An adapter's name is a key of ModuleDicts, which refuse the names of their own attributes.
    if not adapter_name or "." in adapter_name or adapter_name in parts or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"`adapter_name` must be a word that is no part of a module's name, but got {adapter_name!r}: PEFT would "
            "mistake one for the other when it saves. Choose another name."
        )


def check_origin(config: PGNConfig, model: nn.Module) -> None:
    """Refuse a saved adapter that was made for another architecture.

    Raises:
        ValueError: the adapter was made for another supported architecture.
    """
    made_for = (config.auto_mapping or {}).get("base_model_class")
    found = architecture_of(model)
    if config.hidden_size is not None and made_for in SUPPORTED and found is not None and found != made_for:
        raise ValueError(
            f"`model` must be a {made_for}, which the adapter was made for, but got a {type(model).__name__}. Load "
            f"the checkpoint as {made_for}."
        )


def check_offloading(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Refuse a saved adapter where the modules that it wraps lie on a disk.

    Transformers would leave its weights as they were initialised, and PEFT would put them on the meta device. A new
    adapter is made in memory.

    Raises:
        ValueError: `device_map` has the embeddings or the head on "disk".
    """
    if config.hidden_size is None:  # recorded in what was saved
        return
    for part, device in (getattr(model, "hf_device_map", None) or {}).items():
        for name in (backbone.embeddings, backbone.head):
            if device == "disk" and name is not None and (part == "" or _overlap(part, name)):
                raise ValueError(
                    f"`device_map` must keep {name!r} in memory for a saved adapter, whose weights lie beside it, but "
                    f"got {{{part!r}: 'disk'}}. Put the embeddings and the head on a device, and other parts on disk."
                )


def check_modules_to_save(config: PGNConfig, model: nn.Module, backbone: Backbone, layers: list[str]) -> None:
    """Refuse `modules_to_save` that overlap with modules that PGN wraps, or match none, which PEFT would ignore.

    Args:
        config: the adapter's.
        model: the model that gets it.
        backbone: where its embeddings and its head are.
        layers: names of the layers that the adapter wraps.

    Raises:
        ValueError: a name matches no module; or a module, also an earlier adapter's, overlaps with a wrapped one.
    """
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or ():
        matches = [name for name in names if name.endswith(wanted)]  # as PEFT matches them
        if not matches:
            raise ValueError(
                f"`modules_to_save` must name modules of the model, but got {wanted!r}. "
                "`dict(model.named_modules())` lists the names."
            )
        if any(_overlap(name, backbone.head) for name in matches if backbone.head is not None):
            refuse_head_in_modules_to_save(wanted)
        if any(_overlap(name, backbone.embeddings) for name in matches):
            raise ValueError(
                f"`modules_to_save` must not name the embeddings, their parts or what they are part of, but got "
                f"{wanted!r}. PGN wraps {backbone.embeddings!r}; name modules beside it."
            )
    wrapped = {*layers, *(name for name, module in model.named_modules() if isinstance(module, PGNBlock))}
    for name, module in model.named_modules():
        own = any(name.endswith(wanted) for wanted in config.modules_to_save or ())
        if (own or isinstance(module, ModulesToSaveWrapper)) and any(_overlap(name, layer) for layer in wrapped):
            # They would be saved under a name that a model without such layers does not have.
            raise ValueError(
                f"`modules_to_save` must lie outside of the layers after which prompts change or end, but got "
                f"{name!r}. Leave the module frozen, or, where prompt_depth is not 1, set it to 1."
            )


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")
