"""What `input_only.py` compares: a server, a label mapping on it, and visual prompting's border."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from pgn_peft.preprocessing import Preprocessing, normalize


class Border(nn.Module):
    """Visual prompting: a learned border, added to the image and clipped to valid pixels."""

    def __init__(self, server: nn.Module, preprocessing: Preprocessing, side: int) -> None:
        super().__init__()
        self.server, self.preprocessing = server, preprocessing
        width = round(side * 30 / 224)
        self.border = nn.Parameter(torch.zeros(1, 3, side, side))
        mask = torch.ones(1, 1, side, side)
        mask[..., width:-width, width:-width] = 0
        self.register_buffer("mask", mask)

    def prompted(self, pixels: Tensor) -> Tensor:
        """Add the border to pixels (B, 3, H, W) in [0, 1]."""
        return (pixels + self.border * self.mask).clamp(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        return self.server(normalize(self.prompted(pixels), *scale(self.preprocessing))).logits


class Adapted(nn.Module):
    """A model, adapted or not, from pixels in [0, 1] to logits."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing = model, preprocessing

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        return self.model(normalize(pixels, *scale(self.preprocessing))).logits


def scale(preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation."""
    return preprocessing.image_mean, preprocessing.image_std


class Mapped(nn.Module):
    """The server's logits, read through a label mapping."""

    def __init__(self, server: nn.Module, mapping: list[int] | None) -> None:
        super().__init__()
        self.server, self.mapping = server, mapping

    def forward(self, pixel_values: Tensor):
        """Answer normalised pixels with the model's outputs, the logits mapped."""
        outputs = self.server(pixel_values)
        if self.mapping is not None:
            outputs.logits = outputs.logits[:, self.mapping]
        return outputs


def load_server(path: str, side: int | None) -> ViTForImageClassification:
    """Load the model, with its position embeddings resized once and for all if it is to serve another image size."""
    server = ViTForImageClassification.from_pretrained(path).eval()
    if side is None or side == server.config.image_size:
        return server
    embeddings = server.vit.embeddings
    patch = server.config.patch_size
    tokens = torch.zeros(1, (side // patch) ** 2 + 1, server.config.hidden_size)
    positions = embeddings.interpolate_pos_encoding(tokens, side, side).detach()
    weights = server.state_dict() | {"vit.embeddings.position_embeddings": positions}
    server.config.image_size = side
    resized = ViTForImageClassification(server.config).eval()
    resized.load_state_dict(weights)
    return resized
