"""`ImagePrompter` as an ONNX graph, for clients without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pgn_peft.preprocessing import to_8_bit

if TYPE_CHECKING:
    from pgn_peft.prompter import ImagePrompter


class _EightBit(nn.Module):
    """From 8-bit pixels to 8-bit pixels: what ONNX computes."""

    def __init__(self, prompter: ImagePrompter) -> None:
        super().__init__()
        self.prompter = prompter

    def forward(self, image: Tensor) -> Tensor:
        return to_8_bit(self.prompter.prompted(image.float() / 255))


def export_onnx(prompter: ImagePrompter, path: Path) -> None:
    """Write the prompter as an ONNX file; see `ImagePrompter.export_onnx`."""
    if not prompter.in_range:
        raise ValueError(
            "`prompter` must prompt with valid images to be exported, but got exact inverted prompts. Make it with "
            "in_range=True."
        )
    example = torch.zeros(2, prompter.num_channels, *prompter.layout.input_size, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.onnx.export(
            _EightBit(prompter),
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=["prompted"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**31 // example[0].numel())},),
            verbose=False,
        )
    program.save(path)
