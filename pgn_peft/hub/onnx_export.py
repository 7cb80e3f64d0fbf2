"""A classifier with its adapter as an ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.functional import evaluating
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.utils.onnx import export_module


class _Logits(nn.Module):
    """From normalised pixels to logits, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_model(model: nn.Module, image_size: tuple[int, int], path: Path) -> None:
    """Write a model with its active adapter as an ONNX file; see `Classifier.export_onnx`.

    Args:
        model: an image classifier of Transformers, in any mode; it is exported in eval mode.
        image_size: height and width of its images, in pixels.
        path: the file. Weights of more than 2 GiB go into a second file beside it.
    """
    config: Any = model.config
    weight = next(model.parameters())
    example = torch.zeros(2, prompt_layer(model).num_channels, *image_size, device=weight.device)
    with evaluating(model):
        metadata = {"id2label": json.dumps(config.id2label)}
        export_module(_Logits(model).eval(), example, path, "pixel_values", "logits", metadata)
