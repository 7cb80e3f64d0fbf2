"""The picture of an adapter's library on its card. Pillow only."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.library import AdditiveLibrary, TokenLibrary
from pgn_peft.tuner.adapters import find_layer

SIDE = 512  # about, of the picture, in pixels
COLUMNS = 8  # of patches
GAP = 2  # between patches or layers, in pixels
# Blue, white and vermilion, of Okabe and Ito: told apart by everybody, and in print.
COOL, WARM = (0.0, 0.447, 0.698), (0.835, 0.369, 0.0)


def draw_library(model: nn.Module, adapter_name: str) -> tuple[Image.Image, str]:
    """Draw an adapter's library.

    Args:
        model: a model with the adapter.
        adapter_name: the adapter.

    Returns:
        The picture, and what it shows: the patches themselves, or for tokens how similar they are to each other.
    """
    library = find_layer(model, adapter_name).library(adapter_name)
    if isinstance(library, TokenLibrary):
        tokens = library.tokens.detach().float().cpu()
        layers = tokens if tokens.ndim == 3 else tokens[None]
        each = "of each layer with prompts, from the first on: " if len(layers) > 1 else ""
        text = (
            f"The {tokens.shape[-2]} tokens of the library, {each}the cosine similarity of each (row) to each "
            "(column), from -1 (blue) over 0 (white) to 1 (vermilion)."
        )
        return _tile([_similarities(layer) for layer in layers], math.ceil(len(layers) ** 0.5)), text
    patches = library.patches.detach().float().cpu()
    if isinstance(library, AdditiveLibrary):
        text = f"The {len(patches)} changes of the library that are mixed and added to each patch, on grey."
        patches = 0.5 + patches / (2 * patches.abs().max().clamp(min=1e-6))
    else:
        text = f"The {len(patches)} patches of the library, which are mixed into prompts."
    return _tile([_as_array(patch) for patch in patches], COLUMNS), text


def _similarities(tokens: Tensor) -> np.ndarray:
    """Colour the cosine similarities of tokens (L, D): (L, L, 3) in [0, 1]."""
    unit = F.normalize(tokens, dim=1)
    similarity = (unit @ unit.T).clamp(-1, 1).numpy()[..., None]
    ends = np.where(similarity < 0, COOL, WARM)
    return 1 - np.abs(similarity) * (1 - ends)


def _as_array(patch: Tensor) -> np.ndarray:
    """Turn a patch (C, p, p) in [0, 1] into (p, p, 3): grey from one channel, without transparency from four."""
    return patch[:3].expand(3, -1, -1).permute(1, 2, 0).numpy()


def _tile(arrays: list[np.ndarray], columns: int) -> Image.Image:
    """Lay arrays (H, W, 3) in [0, 1] into a grid, enlarged to about `SIDE` in all."""
    columns = min(columns, len(arrays))
    height, width = arrays[0].shape[:2]
    factor = max(1, SIDE // (columns * width))
    rows = -(-len(arrays) // columns)
    size = (columns * (width * factor + GAP) - GAP, rows * (height * factor + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for index, array in enumerate(arrays):
        tile = Image.fromarray((array * 255).round().astype(np.uint8))
        tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        picture.paste(tile, (column * (width * factor + GAP), row * (height * factor + GAP)))
    return picture
