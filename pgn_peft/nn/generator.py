"""The prompt generator: a small CNN and a head that map an image to mixing coefficients.

Plain torch, without PEFT or Transformers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pgn_peft.nn.resize import resize
from pgn_peft.nn.trunk import TRUNKS


def resize_shorter_side(pixel_values: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) so that their shorter side measures `size` pixels, keeping the aspect ratio."""
    height, width = pixel_values.shape[-2:]
    shorter = min(height, width)
    return resize(pixel_values, (size * height // shorter, size * width // shorter))


class FactorisedHead(nn.Module):
    """Mixing logits as products of queries of prompts and keys of library entries, as in attention.

    Differs from the official code, whose head is one linear layer with about ten times as many parameters.

    Args:
        num_features: of the trunk, F.
        num_virtual_tokens: prompts per image, P.
        library_size: entries of the library, L.
        rank: length of a query and of a key, R.
    """

    def __init__(self, num_features: int, num_virtual_tokens: int, library_size: int, rank: int) -> None:
        super().__init__()
        self.queries = nn.Linear(num_features, num_virtual_tokens * rank)
        self.keys = nn.Parameter(torch.empty(library_size, rank).normal_(std=rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_virtual_tokens * library_size))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to logits (B, P * L)."""
        queries = self.queries(features).unflatten(-1, (-1, self.keys.shape[1]))  # (B, P, R)
        return (queries @ self.keys.T).flatten(1) + self.bias  # (B, P * L)


class DenseHead(nn.Module):
    """Mixing logits for each patch of an image of any size: from the features of its place, and of the whole image.

    Args:
        num_place_features: of the trunk's map, F'.
        num_features: of the whole image, F.
        library_size: entries of the library, L.
        patch_size: side of the backbone's patches, in pixels.

    Differs from the official code, which has one prompt for each of P slots, wherever it goes.
    """

    def __init__(self, num_place_features: int, num_features: int, library_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.places = nn.Conv2d(num_place_features, library_size, kernel_size=1)
        self.image = nn.Linear(num_features, library_size, bias=False)

    def forward(self, places: Tensor, features: Tensor, image_size: torch.Size) -> Tensor:
        """Map (B, F', h, w) and (B, F) to logits (B, P, L), row by row, of an image's patches."""
        grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        logits = resize(self.places(places), grid) + self.image(features)[:, :, None, None]
        return logits.flatten(2).transpose(1, 2)


class PromptGenerator(nn.Module):
    """Map an image to the coefficients that mix its prompts from the library.

    Args:
        num_virtual_tokens: prompts per image, P; with `patch_size` only a record of it.
        library_size: entries of the library, L.
        trunk: the CNN, a key of `TRUNKS`.
        num_channels: channels of the image.
        image_size: length that the image's shorter side is resized to, in pixels; None: no resizing.
        width: channels of the trunk's stem.
        norm: "batch", as in the official code, or "group", which needs no running statistics.
        mixing_init_std: standard deviation of the initial bias of the logits; 0 keeps torch's small default, with
            which all prompts start as nearly the same mixture.
        rank: length of queries and keys of a factorised head; None: one linear layer, as in the official code.
        patch_size: one prompt for each patch of the image, whose side is this many pixels, by a `DenseHead`; None: one
            for each of P slots.

    Attributes:
        settings: the arguments that determine the parameters, for saving.

    Source: arXiv:2210.06466 and its official code.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        library_size: int,
        trunk: str = "resnet10",
        num_channels: int = 3,
        image_size: int | None = None,
        width: int = 16,
        norm: str = "batch",
        mixing_init_std: float = 0.0,
        rank: int | None = None,
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.library_size = library_size
        self.image_size = image_size
        self.settings: dict[str, Any] = {
            "num_virtual_tokens": num_virtual_tokens,
            "library_size": library_size,
            "trunk": trunk,
            "image_size": image_size,
            "width": width,
            "norm": norm,
            "rank": rank,
        }
        self.trunk = TRUNKS[trunk](num_channels=num_channels, width=width, norm=norm)
        self.head: nn.Linear | FactorisedHead | DenseHead
        if patch_size is not None:
            self.head = DenseHead(self.trunk.num_place_features, self.trunk.num_features, library_size, patch_size)
        elif rank is None:
            self.head = nn.Linear(self.trunk.num_features, num_virtual_tokens * library_size)
        else:
            self.head = FactorisedHead(self.trunk.num_features, num_virtual_tokens, library_size, rank)
        if mixing_init_std > 0:
            biased = self.head.places if isinstance(self.head, DenseHead) else self.head
            nn.init.normal_(cast(Tensor, biased.bias), std=mixing_init_std)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, float32 unless the whole model was cast."""
        # Of a convolution: dynamic quantisation makes the linear layers' parameters methods.
        return self.trunk.stem_conv.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute the mixing coefficients.

        Args:
            pixel_values: (B, C, H, W), normalised as for the backbone, any floating dtype.

        Returns:
            (B, P, L) coefficients, non-negative; those of a prompt sum to 1.
        """
        size = pixel_values.shape[-2:]
        pixel_values = pixel_values.to(self.dtype)
        if self.image_size is not None:
            pixel_values = resize_shorter_side(pixel_values, self.image_size)
        places, features = self.trunk(pixel_values)
        if isinstance(self.head, DenseHead):
            logits = self.head(places, features, size)
        else:
            logits = self.head(features).unflatten(1, (self.num_virtual_tokens, -1))  # (B, P, L)
        return logits.softmax(dim=-1)
