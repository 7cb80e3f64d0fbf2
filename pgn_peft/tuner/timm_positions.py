"""timm's Vision Transformers, which add positions in a method and not in a module: prompts are appended after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pgn_peft.nn.positions import extend_joined_rotations
from pgn_peft.tuner.subclassing import add_methods


def append_prompts(backbone: nn.Module) -> None:
    """Let a timm model take tokens with prompts from its wrapped `patch_embed`."""
    add_methods(backbone, _attributes)


def check_timm(backbone: Any) -> None:
    """Refuse models of timm other than Vision Transformers and EVAs.

    Raises:
        TypeError: the model is none.
        ValueError: it drops tokens in training, and would drop prompts.
    """
    names = {base.__name__ for base in type(backbone).__mro__}
    # Hybrids make their tokens of a CNN's features.
    patch_embed = getattr(backbone, "patch_embed", None)
    plain = isinstance(getattr(patch_embed, "proj", None), nn.Conv2d) and not hasattr(patch_embed, "backbone")
    if not names & {"VisionTransformer", "Eva"} or not hasattr(backbone, "_pos_embed") or not plain:
        raise TypeError(
            f"`model` must wrap a VisionTransformer or an Eva of timm, but got a {type(backbone).__name__}. PGN needs "
            "tokens of patches, and a sequence that prompts can be appended to."
        )
    if hasattr(backbone, "head_dist"):
        raise TypeError(
            f"`model` must have one head, but got a {type(backbone).__name__}, which averages two: an adapter has one "
            "head of its own. Load the checkpoint as DeiTForImageClassification."
        )
    if not backbone.global_pool and backbone.attn_pool is None:
        raise ValueError(
            f"`global_pool` must be 'token', 'avg' or another pooling of timm, but got {backbone.global_pool!r}. A "
            "head needs one vector of an image."
        )
    if getattr(backbone.patch_drop, "prob", 0):
        raise ValueError(
            f"`patch_drop_rate` must be 0, but got {backbone.patch_drop.prob}: it would drop prompts. Make the model "
            "without it."
        )


def _attributes(base: Any) -> dict[str, Any]:
    def _pos_embed(self: Any, x: Any) -> Any:
        if not isinstance(x, tuple):
            return base._pos_embed(self, x)
        tokens, prompts, number = x
        output = base._pos_embed(self, tokens)
        if not isinstance(output, tuple):
            return torch.cat([output, prompts], dim=1)
        tokens, rotations = output  # of the patches; prompts are not rotated
        tokens = torch.cat([tokens, prompts], dim=1)
        return tokens, None if rotations is None else extend_joined_rotations(rotations, number)

    return {"_pos_embed": _pos_embed}
