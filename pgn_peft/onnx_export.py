"""ONNX graphs, for those without torch: a prompter, or a model together with its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pgn_peft.preprocessing import to_8_bit

if TYPE_CHECKING:
    from pgn_peft.prompter import ImagePrompter


class _EightBit(nn.Module):
    """From 8-bit pixels to 8-bit pixels."""

    def __init__(self, prompter: ImagePrompter) -> None:
        super().__init__()
        self.prompter = prompter

    def forward(self, image: Tensor) -> Tensor:
        return to_8_bit(self.prompter.prompted(image.float() / 255))


class _Logits(nn.Module):
    """From normalised pixels to logits, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_prompter(prompter: ImagePrompter, path: Path) -> None:
    """Write the prompter as an ONNX file; see `ImagePrompter.export_onnx`."""
    if not prompter.in_range:
        raise ValueError(
            "`prompter` must prompt with valid images to be exported, but got exact inverted prompts. Make it with "
            "in_range=True."
        )
    example = torch.zeros(2, prompter.num_channels, *prompter.layout.input_size, dtype=torch.uint8)
    _export(_EightBit(prompter).eval(), example, path, "image", "prompted", {})


def export_model(model: nn.Module, image_size: tuple[int, int], path: Path) -> None:
    """Write a model with its active adapter as an ONNX file; see `Classifier.export_onnx`.

    Args:
        model: an image classifier of Transformers, in any mode; it is exported in eval mode.
        image_size: height and width of its images, in pixels.
        path: the file. Weights of more than 2 GiB go into a second file beside it.
    """
    weight = next(model.parameters())
    example = torch.zeros(2, model.config.num_channels, *image_size, device=weight.device)
    modes = {module: module.training for module in model.modules()}
    try:
        _export(
            _Logits(model).eval(),
            example,
            path,
            "pixel_values",
            "logits",
            {"id2label": json.dumps(model.config.id2label)},
        )
    finally:
        for module, training in modes.items():
            module.training = training


def _export(
    module: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str, metadata: dict[str, str]
) -> None:
    """Write a module of one input (B, ...) and one output for batches of any size."""
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**31 // example[0].numel())},),
            verbose=False,
        )
    program.model.metadata_props.update(metadata)
    program.save(path)
