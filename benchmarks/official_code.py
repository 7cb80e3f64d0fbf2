"""The official implementation of PGN, from a local checkout, as a step to time beside ours.

It needs pytorch-lightning, torchmetrics and openai-clip (which needs `pkg_resources`, of an older setuptools), and
never becomes part of this project:

    git clone https://github.com/jochemloedeman/PGN
    pip install pytorch-lightning torchmetrics openai-clip ftfy regex "setuptools<81"

Its pretrained backbones are replaced by random ones of the same shapes; speed does not depend on the values.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
import torchvision
from torch import nn

# Sizes of CLIP ViT-B/32.
CLIP_SIZES = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 32,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}


def settings(num_virtual_tokens: int, library_size: int) -> dict:
    """Return what the official scripts pass for their "resnet10"."""
    return {
        "prompt_mode": "pgn",
        "nr_output_vectors": num_virtual_tokens,
        "mixture_size": library_size,
        "vector_dim": 768,
        "model_type": "resnet10",
        "pgn_act_fn": "softmax",
        "pgn_resolution": 224,
        "proj_type": "linear",
        "blocks_per_group": 1,
        "initial_channels": 16,
        "nr_groups": 4,
        "init_max_pool": True,
    }


def load(checkout: str, kind: str, num_labels: int, num_virtual_tokens: int, library_size: int) -> nn.Module:
    """Make the official model: normalised images (B, 3, 224, 224) to logits.

    Args:
        checkout: folder of the official repository.
        kind: "vit", a supervised ViT-B/32 with a linear head, or "clip", CLIP's ViT-B/32, whose head is made of the
            classes' names by the text tower, in every step.
        num_labels: classes.
        num_virtual_tokens: prompts per image, P.
        library_size: entries of the library, L.
    """
    if not Path(checkout, "pgn", "lightning").is_dir():
        raise SystemExit(f"`official` must be a checkout of the official code, but got {checkout!r}. Clone it first.")
    sys.path.insert(0, checkout)
    pgn = settings(num_virtual_tokens, library_size)
    # Its metrics were written for an older torchmetrics, and are not used in a step.
    with mock.patch("torchmetrics.Accuracy", return_value=nn.Identity()):
        if kind == "vit":
            return _vit(pgn, num_labels)
        return _clip(pgn, num_labels)


def _vit(pgn: dict, num_labels: int) -> nn.Module:
    from pgn.lightning.pgn_vit import ViTPGN

    tower = torchvision.models.vit_b_32(weights=None)
    with mock.patch("torchvision.models.vit_b_32", return_value=tower):
        model = ViTPGN("sgd", 50, num_labels, pgn_settings=pgn, random_classifier=True)
    model.vit_model.requires_grad_(False)
    model.vit_model.heads.requires_grad_(True)
    return model


def _clip(pgn: dict, num_labels: int) -> nn.Module:
    from clip import clip
    from clip.model import CLIP
    from pgn.lightning.pgn_clip import PGNCLIP

    tower = CLIP(**CLIP_SIZES)
    with mock.patch.object(clip, "load", return_value=(tower, None)):
        model = PGNCLIP(pgn_settings=pgn)
    model.clip_model.requires_grad_(False)
    names = [f"a photo of a class number {index}." for index in range(num_labels)]
    model.tokenized_prompts = torch.cat([clip.tokenize(name) for name in names])
    return model
