"""Supported and refused backbones: where their tokens are made, and where they are read.

No other module names an architecture.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Backbone:
    """Where PGN attaches to a model.

    Args:
        embeddings: name of the module that turns pixels into tokens.
        head: name of the classification head, or None for a model that returns features.
        reads_all: more than token 0 (CLS) is read, so that prompts are removed after the last layer.
        head_width: features that the head takes, as a multiple of the width D.
    """

    embeddings: str
    head: str | None
    reads_all: bool = False
    head_width: int = 1


# Name of the classification head in every supported classifier.
HEAD = "classifier"

# Appended tokens act through attention only: either token 0 (CLS) alone is read, or prompts are removed before.
SUPPORTED: dict[str, Backbone] = {
    "ViTForImageClassification": Backbone("vit.embeddings", HEAD),
    "DeiTForImageClassification": Backbone("deit.embeddings", HEAD),
    "ViTMSNForImageClassification": Backbone("vit.embeddings", HEAD),
    "ViTModel": Backbone("embeddings", None),
    "DeiTModel": Backbone("embeddings", None),
    "ViTMSNModel": Backbone("embeddings", None),
    # CLS beside the average of the patches.
    "Dinov2ForImageClassification": Backbone("dinov2.embeddings", HEAD, reads_all=True, head_width=2),
    "Dinov2Model": Backbone("embeddings", None, reads_all=True),
    "Dinov2WithRegistersForImageClassification": Backbone(
        "dinov2_with_registers.embeddings", HEAD, reads_all=True, head_width=2
    ),
    "Dinov2WithRegistersModel": Backbone("embeddings", None, reads_all=True),
    # The average of all tokens, which are patches.
    "IJepaForImageClassification": Backbone("ijepa.embeddings", HEAD, reads_all=True),
    "IJepaModel": Backbone("embeddings", None, reads_all=True),
    # The average of the patches; the towers for features read CLS (CLIP) or attend to all tokens (SigLIP).
    "CLIPForImageClassification": Backbone("vision_model.embeddings", HEAD, reads_all=True),
    "CLIPVisionModel": Backbone("embeddings", None),
    "CLIPVisionModelWithProjection": Backbone("vision_model.embeddings", None),
    "SiglipForImageClassification": Backbone("vision_model.embeddings", HEAD, reads_all=True),
    "SiglipVisionModel": Backbone("embeddings", None, reads_all=True),
}

# Why prompts that were trained as tokens cannot become pixels for such a backbone.
AVERAGES_PATCHES = "it averages its patches, and would include those that hold prompts, unlike in training"
_COUNTS = "its attention needs a position for every token, and a prompt has none"
_WINDOWS = "it has no sequence that a token could be appended to"
_MAPS = "it returns feature maps of its layers, and prompts would be taken for patches"
_TWO_TOWERS = "it has a tower for texts too; load the checkpoint as one of these"
_PATCHES = "it takes patches of many sizes instead of images"
_REBUILDS = "it rebuilds the image from the patch tokens, and prompts would be taken for patches"
_WRAPPED = "it wraps a model; make the adapter on the model inside, and wrap the result of get_peft_model"

# The longest prefix of the class name decides.
REFUSED: dict[str, str] = {
    "ViTForMaskedImageModeling": _REBUILDS,
    "DeiTForMaskedImageModeling": _REBUILDS,
    "DeiTForImageClassificationWithTeacher": "it has two heads, and Transformers offers it for inference only; load "
    "the checkpoint as DeiTForImageClassification",
    "CLIP": _TWO_TOWERS,
    "Siglip": _TWO_TOWERS,
    "Siglip2": _PATCHES,
    "Beit": _COUNTS,
    "Data2VecVision": _COUNTS,
    "Dinov2": _MAPS,
    "DINOv3": _COUNTS,
    "Swin": _WINDOWS,
    "Convnext": _WINDOWS,
    "ConvNext": _WINDOWS,
    "ResNet": _WINDOWS,
    "OptimizedModule": _WRAPPED,
    "DistributedDataParallel": _WRAPPED,
    "DataParallel": _WRAPPED,
}


def find_backbone(model: nn.Module, target_modules: list[str] | None = None) -> Backbone:
    """Find where PGN attaches to `model`.

    Args:
        model: the model to adapt. A subclass of a supported architecture counts as that architecture.
        target_modules: one name, in full or its end, of the embeddings module. Needed for a look-alike only; its
            head is then its `classifier`, if it has one.

    Returns:
        Full names of the embeddings and the head in `model`.

    Raises:
        TypeError: the architecture is not supported.
        ValueError: `target_modules` names no module, or one that is not the embeddings of a ViT.
    """
    name = type(model).__name__
    architecture = architecture_of(model)
    if architecture is not None:
        supported = SUPPORTED[architecture]
        if target_modules is not None and not _ends_with(supported.embeddings, target_modules[0]):
            raise ValueError(
                f"`target_modules` must be [{supported.embeddings!r}] for a {name}, but got {target_modules!r}. "
                "Leave it out."
            )
        return supported

    prefix = max((prefix for prefix in REFUSED if name.startswith(prefix)), key=len, default=None)
    if prefix is not None:
        raise TypeError(f"`model` must be one of {_supported_names()}, but got a {name}: {REFUSED[prefix]}.")
    if target_modules is None:
        raise TypeError(
            f"`model` must be one of {_supported_names()}, but got a {name}. PGN needs a Vision Transformer that "
            "classifies from token 0. If this is a look-alike of one, name the module that makes its tokens: "
            "PGNConfig(target_modules='...embeddings')."
        )
    return _find_look_alike(model, target_modules[0])


def find_layers(model: nn.Module, embeddings: str) -> list[str]:
    """Return the names of the backbone's encoder layers, in order.

    Args:
        model: the model that is adapted.
        embeddings: full name of its embeddings.

    Raises:
        ValueError: beside the embeddings there is not exactly one list of layers.
    """
    above = embeddings.rpartition(".")[0]
    parent = model.get_submodule(above)
    # A tower's own config where the model has two.
    config = getattr(parent, "config", getattr(model, "config", None))
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (f"{above}.{name}".strip("."), module)
        for name, module in parent.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(lists) != 1:
        raise ValueError(
            f"`prompt_depth` must be 1 for a {type(model).__name__}, in which {len(lists)} lists of "
            f"`num_hidden_layers` layers were found beside the embeddings, but got more. Leave it out."
        )
    name, layers = lists[0]
    return [f"{name}.{index}" for index in range(len(layers))]


def patch_projection(embeddings: nn.Module) -> nn.Conv2d:
    """Return the convolution that makes a token (D,) of each patch (C, p, p), whatever the architecture calls it."""
    parts: Any = embeddings
    return parts.patch_embeddings.projection if hasattr(parts, "patch_embeddings") else parts.patch_embedding


def own_image_size(embeddings: nn.Module) -> tuple[int, int]:
    """Return height and width in pixels of the images that the position embeddings were trained for."""
    parts: Any = embeddings
    if hasattr(parts, "patch_embeddings"):
        height, width = parts.patch_embeddings.image_size
        return height, width
    return parts.image_size, parts.image_size


def has_class_token(embeddings: nn.Module) -> bool:
    """Whether token 0 is CLS rather than the first patch."""
    return hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")


def takes_any_size(embeddings: nn.Module) -> bool:
    """Whether a backbone's embeddings interpolate their positions for an image of another size without being told."""
    options = inspect.signature(embeddings.forward).parameters
    return hasattr(embeddings, "interpolate_pos_encoding") and "interpolate_pos_encoding" not in options


def architecture_of(model: nn.Module) -> str | None:
    """Name the supported architecture that `model` is, or is a subclass of; None if it is neither."""
    return next((base.__name__ for base in type(model).__mro__ if base.__name__ in SUPPORTED), None)


def _find_look_alike(model: nn.Module, target: str) -> Backbone:
    matches = [name for name, _ in model.named_modules() if _ends_with(name, target)]
    if len(matches) != 1:
        found = f"{len(matches)} modules: {', '.join(matches)}" if matches else "no module"
        raise ValueError(
            f"`target_modules` must name one module of the model, but got {target!r}, which is the name of {found}. "
            "`dict(model.named_modules())` lists the names."
        )
    embeddings = model.get_submodule(matches[0])
    # A wrapped module forwards these attributes, so an adapter can be added to a look-alike that has one.
    if not (hasattr(embeddings, "cls_token") and hasattr(embeddings, "patch_embeddings")):
        raise ValueError(
            f"`target_modules` must name the embeddings of a ViT, with `cls_token` and `patch_embeddings`, but got "
            f"{target!r}, a {type(embeddings).__name__}. Name the module that turns pixels into tokens."
        )
    return Backbone(matches[0], HEAD if hasattr(model, HEAD) else None)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _supported_names() -> str:
    return ", ".join(SUPPORTED)
