"""A module as an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def export_module(
    module: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str, metadata: dict[str, str]
) -> None:
    """Write a module of one input (B, ...) and one output for batches of any size."""
    with torch.no_grad():
        program: Any = torch.onnx.export(
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
