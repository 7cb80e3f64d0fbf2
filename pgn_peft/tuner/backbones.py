"""Supported and refused backbones: where their tokens are made, and where they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.functional import extend_bias, extend_rotations
from pgn_peft.tuner.embeddings import has_class_token, patch_projection

# How a head of the adapter's own reads the output of a model that has none, as the classifiers of these models do.
Reader = Callable[[nn.Module, Any], Tensor]


def _class_token(model: nn.Module, output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _average(model: nn.Module, output: Any) -> Tensor:
    return output.last_hidden_state.mean(dim=1)


def _class_token_and_average(model: nn.Module, output: Any) -> Tensor:
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = output.last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, first:].mean(dim=1)], dim=1)


def _pooled(model: nn.Module, output: Any) -> Tensor:
    if output.pooler_output is not None:
        return output.pooler_output
    # A model that was made without its pool: the average of the patches.
    first = int(has_class_token(model.get_submodule("embeddings")))
    return output.last_hidden_state[:, first:].mean(dim=1)


def _pooled_by_timm(model: nn.Module, output: Any) -> Tensor:
    backbone: Any = model.get_submodule("timm_model")
    return backbone.forward_head(output.last_hidden_state)


def _image_embeds(model: nn.Module, output: Any) -> Tensor:
    return output.image_embeds


# From a module's output and a number of prompts P to the output for as many tokens more.
Extension = Callable[[Any, int], Any]
_ROTATIONS: dict[str, Extension] = {"rope_embeddings": extend_rotations}
_BIASES: dict[str, Extension] = {"relative_position_bias": extend_bias, "shared_position_bias": extend_bias}


@dataclass(frozen=True)
class Backbone:
    """Where PGN attaches to a model.

    Args:
        embeddings: name of the module that turns pixels into tokens.
        head: name of the classification head, or None for a model that returns features.
        reads_all: more than token 0 (CLS) is read, so that prompts are removed after the last layer.
        head_width: features that a head takes, as a multiple of the width D.
        read: for a model without a head: from the model and its output to the features (B, F) that an adapter's head
            takes; None: it cannot have one.
        has_texts: these features can be compared with embeddings of texts.
        text_scale: factor of the cosines for a tower that lacks the whole model's; None: users must give it.
        image_method: name of the method that computes the output for images alone; None: the model's forward pass.
        positions: where attention has a position for every token: the modules that compute them, by the last part of
            their names, and the function that extends what they return by P tokens without a position, which come
            last. Else None.
        carries: the embeddings do not add the positions: the model's own `_pos_embed` does, and appends prompts.
        called: name of the module whose calls are checked; None: the one that the embeddings are part of.
    """

    embeddings: str
    head: str | None
    reads_all: bool = False
    head_width: int = 1
    read: Reader | None = None
    has_texts: bool = False
    text_scale: float | None = None
    image_method: str | None = None
    positions: Mapping[str, Extension] | None = None
    carries: bool = False
    called: str | None = None

    def num_features(self, model: nn.Module) -> int:
        """Return the number of features F that a head of `model` takes."""
        projection = getattr(model, "visual_projection", None)
        if projection is not None:
            return projection.out_features
        return self.head_width * patch_projection(model.get_submodule(self.embeddings)).out_channels


# Name of the classification head in Transformers' own classifiers, and of the one that a model without gets.
HEAD = "classifier"

# Appended tokens act through attention only: either token 0 (CLS) alone is read, or prompts are removed before.
SUPPORTED: dict[str, Backbone] = {
    "ViTForImageClassification": Backbone("vit.embeddings", HEAD),
    "DeiTForImageClassification": Backbone("deit.embeddings", HEAD),
    "ViTMSNForImageClassification": Backbone("vit.embeddings", HEAD),
    "ViTModel": Backbone("embeddings", None, read=_class_token),
    "DeiTModel": Backbone("embeddings", None, read=_class_token),
    "ViTMSNModel": Backbone("embeddings", None, read=_class_token),
    # CLS beside the average of the patches.
    "Dinov2ForImageClassification": Backbone("dinov2.embeddings", HEAD, reads_all=True, head_width=2),
    "Dinov2Model": Backbone("embeddings", None, reads_all=True, head_width=2, read=_class_token_and_average),
    "Dinov2WithRegistersForImageClassification": Backbone(
        "dinov2_with_registers.embeddings", HEAD, reads_all=True, head_width=2
    ),
    "Dinov2WithRegistersModel": Backbone(
        "embeddings", None, reads_all=True, head_width=2, read=_class_token_and_average
    ),
    # The average of all tokens, which are patches.
    "IJepaForImageClassification": Backbone("ijepa.embeddings", HEAD, reads_all=True),
    "IJepaModel": Backbone("embeddings", None, reads_all=True, read=_average),
    # The average of the patches; the towers for features read CLS (CLIP) or attend to all tokens (SigLIP).
    "CLIPForImageClassification": Backbone("vision_model.embeddings", HEAD, reads_all=True),
    "CLIPVisionModel": Backbone("embeddings", None, read=_pooled),
    "CLIPVisionModelWithProjection": Backbone(
        "vision_model.embeddings",
        None,
        read=_image_embeds,
        has_texts=True,
        text_scale=100.0,  # of OpenAI's checkpoints
    ),
    "CLIPModel": Backbone(
        "vision_model.embeddings", None, read=_pooled, has_texts=True, image_method="get_image_features"
    ),
    "SiglipForImageClassification": Backbone("vision_model.embeddings", HEAD, reads_all=True),
    "SiglipVisionModel": Backbone("embeddings", None, reads_all=True, read=_pooled, has_texts=True),
    "SiglipModel": Backbone(
        "vision_model.embeddings",
        None,
        reads_all=True,
        read=_pooled,
        has_texts=True,
        image_method="get_image_features",
    ),
    # Positions are added to, or rotate, queries and keys of every layer.
    "DINOv3ViTModel": Backbone(
        "embeddings",
        None,
        reads_all=True,
        head_width=2,
        read=_class_token_and_average,
        positions=_ROTATIONS,
    ),
    "BeitForImageClassification": Backbone("beit.embeddings", HEAD, reads_all=True, positions=_BIASES),
    "BeitModel": Backbone("embeddings", None, reads_all=True, read=_pooled, positions=_BIASES),
    "Data2VecVisionForImageClassification": Backbone(
        "data2vec_vision.embeddings", HEAD, reads_all=True, positions=_BIASES
    ),
    "Data2VecVisionModel": Backbone("embeddings", None, reads_all=True, read=_pooled, positions=_BIASES),
    # An attention pool reads all tokens.
    "Aimv2VisionModel": Backbone("embeddings", None, reads_all=True, read=_pooled),
    # timm's ViTs and EVAs, whatever they pool.
    "TimmWrapperForImageClassification": Backbone(
        "timm_model.patch_embed", "timm_model.head", reads_all=True, carries=True, called=""
    ),
    "TimmWrapperModel": Backbone(
        "timm_model.patch_embed", None, reads_all=True, read=_pooled_by_timm, carries=True, called=""
    ),
}

# Why prompts that were trained as tokens cannot become pixels for such a backbone.
AVERAGES_PATCHES = "it averages its patches, and would include those that hold prompts, unlike in training"
GIVES_POSITIONS = "its attention gives every patch a position, and prompts in latent space have none"
_WINDOWS = "it has no sequence that a token could be appended to"
_MAPS = "it returns feature maps of its layers, and prompts would be taken for patches"
_TWO_TOWERS = "it has a tower for texts too; use a checkpoint of one of these classes"
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
    "BeitForMaskedImageModeling": _REBUILDS,
    "Beit": _MAPS,
    "Data2VecVision": _MAPS,
    "Dinov2": _MAPS,
    "DINOv3ViT": _MAPS,
    "DINOv3ConvNext": _WINDOWS,
    "Aimv2": _TWO_TOWERS,
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
                f"A {name} makes its tokens in {supported.embeddings!r}, not in {target_modules[0]!r}. An adapter "
                "saved with this `target_modules` is for another architecture; in a new config leave it out."
            )
        if supported.carries:
            _check_timm(model.get_submodule(supported.embeddings.rpartition(".")[0]))
        return supported

    prefix = max((prefix for prefix in REFUSED if name.startswith(prefix)), key=len, default=None)
    if prefix is not None:
        raise TypeError(f"PGN cannot adapt a {name}: {REFUSED[prefix]}. It adapts {', '.join(SUPPORTED)}.")
    if target_modules is None:
        raise TypeError(
            f"PGN does not know a {name}. It adapts {', '.join(SUPPORTED)}. For a look-alike that classifies from "
            "token 0 name the module that makes its tokens: PGNConfig(target_modules='...embeddings')."
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
        if (isinstance(module, nn.ModuleList) and len(module) == num_layers) or name == "blocks"  # timm's
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{len(lists)} lists of encoder layers were found in this {type(model).__name__}, so they cannot have "
            "prompts of their own: set prompt_depth=1."
        )
    name, layers = lists[0]
    return [f"{name}.{index}" for index in range(len(layers))]


def architecture_of(model: nn.Module) -> str | None:
    """Name the supported architecture that `model` is, or is a subclass of; None if it is neither."""
    return next((base.__name__ for base in type(model).__mro__ if base.__name__ in SUPPORTED), None)


def _find_look_alike(model: nn.Module, target: str) -> Backbone:
    matches = [name for name, _ in model.named_modules() if _ends_with(name, target)]
    # A wrapped module forwards these attributes, so an adapter can be added to a look-alike that has one.
    found = [model.get_submodule(name) for name in matches]
    if len(found) != 1 or not (hasattr(found[0], "cls_token") and hasattr(found[0], "patch_embeddings")):
        raise ValueError(
            f"target_modules={target!r} matches {', '.join(matches) or 'no module'}. It must be the name of one "
            "module, a ViT's embeddings with `cls_token` and `patch_embeddings`; `dict(model.named_modules())` lists "
            "all names."
        )
    return Backbone(matches[0], HEAD if hasattr(model, HEAD) else None)


def _check_timm(backbone: Any) -> None:
    """Refuse models of timm other than Vision Transformers and EVAs with one head.

    Raises:
        TypeError: the model is none, or has two heads.
        ValueError: it pools nothing, or drops tokens in training, and would drop prompts.
    """
    name, names = type(backbone).__name__, {base.__name__ for base in type(backbone).__mro__}
    # Hybrids make their tokens of a CNN's features.
    patch_embed = getattr(backbone, "patch_embed", None)
    plain = isinstance(getattr(patch_embed, "proj", None), nn.Conv2d) and not hasattr(patch_embed, "backbone")
    if not names & {"VisionTransformer", "Eva"} or not hasattr(backbone, "_pos_embed") or not plain:
        raise TypeError(f"Of timm's models PGN adapts VisionTransformer and Eva, but this is a {name}.")
    if hasattr(backbone, "head_dist"):
        raise TypeError(f"A {name} averages two heads. Load the checkpoint as DeiTForImageClassification.")
    if not backbone.global_pool and backbone.attn_pool is None:
        raise ValueError(f"global_pool={backbone.global_pool!r} leaves a head no vector of an image. Use e.g. 'avg'.")
    if getattr(backbone.patch_drop, "prob", 0):
        raise ValueError("`patch_drop_rate` would drop prompts too. Make the model without it.")


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
