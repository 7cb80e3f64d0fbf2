"""What is checked before an adapter is made, so that a refusal leaves the model as it was."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pgn_peft.backbones import SUPPORTED, Backbone, architecture_of
from pgn_peft.block import PGNBlock
from pgn_peft.checks import refuse_head_in_modules_to_save
from pgn_peft.config import PGNConfig
from pgn_peft.generator import PromptGenerator
from pgn_peft.head import PGNHead
from pgn_peft.layer import PGNLayer, PGNTunerLayer
from pgn_peft.library import TokenLibrary
from pgn_peft.rows import BASE


def refuse_other_adapters(model: nn.Module) -> None:
    """Refuse a model that PEFT has wrapped, or that carries adapters of another method.

    Raises:
        ValueError: it is one.
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
    """Refuse a name that is no name of a folder, or that could be mistaken for a part of a tensor's name.

    Raises:
        ValueError: it is one of these.
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
    parts.add(BASE)  # names the model without an adapter
    # ModuleDict keeps adapters under their names, and has attributes of its own.
    if not adapter_name or "." in adapter_name or adapter_name in parts or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"`adapter_name` must be a word that is no part of a module's name, but got {adapter_name!r}: PEFT would "
            "mistake one for the other when it saves. Choose another name."
        )


def check_origin(config: PGNConfig, model: nn.Module) -> None:
    """Refuse a saved adapter that was made for another architecture.

    Raises:
        ValueError: it was.
    """
    made_for = (config.auto_mapping or {}).get("base_model_class")
    found = architecture_of(model)
    if config.hidden_size is not None and made_for in SUPPORTED and found is not None and found != made_for:
        raise ValueError(
            f"`model` must be a {made_for}, which the adapter was made for, but got a {type(model).__name__}. Load "
            f"the checkpoint as {made_for}."
        )


def check_modules_to_save(config: PGNConfig, model: nn.Module, backbone: Backbone, layers: list[str]) -> None:
    """Refuse `modules_to_save` that take hold of what PGN wraps, or of nothing, which PEFT would pass over in silence.

    Args:
        config: the adapter's.
        model: the model that gets it.
        backbone: where its embeddings and its head are.
        layers: names of the layers that the adapter wraps.

    Raises:
        ValueError: one does, this adapter's or one that the model has already.
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
                f"`modules_to_save` must lie outside of the layers behind which prompts change or end, but got "
                f"{name!r}. Leave the module frozen, or, where prompt_depth is not 1, set it to 1."
            )


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")
