"""Exports a module as an ONNX graph that gives the same results in all runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# How backbones resize their position embeddings. Runtimes compute these in different ways (openvino#35893).
INTERPOLATIONS: tuple[Any, ...] = (
    torch.ops.aten.upsample_bicubic2d.vec,
    torch.ops.aten._upsample_bicubic2d_aa.vec,
)


def export_module(
    module: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str, metadata: dict[str, str]
) -> None:
    """Export a module with one input (B, ...) and one output, for batches of any size."""
    batch = torch.export.Dim("batch", min=1, max=2**31 // example[0].numel())
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        exported: Any = torch.onnx.export(
            _with_matrix_products(program),
            dynamo=True,
            input_names=[input_name],
            output_names=[output_name],
            verbose=False,
        )
    exported.model.metadata_props.update(metadata)
    exported.save(path)


def _with_matrix_products(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace each resize of a fixed size by products with two matrices: one for the rows, one for the columns.

    The matrix of an axis is the resized identity matrix.
    """
    matrices: dict[tuple[Any, int, int], Tensor] = {}
    for node in program.graph.nodes:
        if node.target in INTERPOLATIONS:
            sides = zip(node.args[0].meta["val"].shape[-2:], node.meta["val"].shape[-2:], strict=True)
            for before, after in sides:
                identity = torch.eye(before)[None, None]  # (1, 1, before, before)
                matrices[node.target, before, after] = node.target(identity, [after, before], False, None)[0, 0]

    def decomposition(interpolation: Any) -> Any:
        def resize(pixels: Tensor, size: list[int], *_: Any) -> Tensor:
            sides = zip(pixels.shape[-2:], size, strict=True)
            rows, columns = (matrices[interpolation, *side].to(pixels) for side in sides)
            return rows @ pixels @ columns.mT

        return resize

    return program.run_decompositions({each: decomposition(each) for each in INTERPOLATIONS})
