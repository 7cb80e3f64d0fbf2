"""Published methods that adapt a frozen model through the pixels of its input, each as a small module.

Every module has `prompted`: pixels (B, C, H, W) in [0, 1] to pixels in [0, 1] that are rounded to 8 bits, so that what
is trained is an image that can be sent. Gradients pass the rounding unchanged. (The papers add floats, and most do not
clip them.)

`PEERS` has two learning rates for each, to choose from on validation: that of the paper where it carries over to the
common loop (AdamW, 12 epochs), and one more. The docstrings have the published rates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.layout import to_levels
from pgn_peft.nn.preprocessing import normalize

# Width of a border, as a share of the image's side: 30 of 224 pixels in the paper.
BORDER = 30 / 224
Scale = tuple[tuple[float, ...], tuple[float, ...]]


class PixelPrompt(nn.Module):
    """A learned change of images.

    Args:
        side: of the images, in pixels.
        scale: mean and standard deviation that the model's processor normalises with.
    """

    def __init__(self, side: int, scale: Scale) -> None:
        super().__init__()
        self.side, self.scale = side, scale

    def prompted(self, pixels: Tensor) -> Tensor:
        """Change images (B, 3, H, W) in [0, 1]; the result is in [0, 1] and rounded to 8 bits."""
        return to_levels(self.change(pixels))

    def change(self, pixels: Tensor) -> Tensor:
        """Change images (B, 3, H, W) in [0, 1]; the result may leave the range."""
        raise NotImplementedError

    def pixels_of(self, pattern: Tensor) -> Tensor:
        """Turn a pattern (..., 3, H, W) in the units of normalised pixels into one in those of pixels in [0, 1]."""
        return pattern * torch.tensor(self.scale[1], device=pattern.device)[:, None, None]


class Border(PixelPrompt):
    """VP, visual prompting: a border is added to the image.

    Source: Bahng et al. 2022, arXiv:2203.17274. Published: SGD with momentum 0.9, rate 40, 1,000 epochs, which does
    not carry over to AdamW; our two rates are those between which it was best in earlier trials.
    """

    def __init__(self, side: int, scale: Scale) -> None:
        super().__init__(side, scale)
        width = round(side * BORDER)
        outside = torch.ones(side, side, dtype=torch.bool)
        outside[width:-width, width:-width] = False
        self.register_buffer("places", outside.flatten().nonzero()[:, 0])
        self.border = nn.Parameter(torch.zeros(3, len(self.places)))

    def change(self, pixels: Tensor) -> Tensor:
        """Add the border."""
        empty = self.border.new_zeros(3, self.side**2)
        return pixels + empty.index_copy(1, self.places, self.border).unflatten(1, (self.side, self.side))


class Masked(PixelPrompt):
    """SMM, sample-specific masks: a pattern, multiplied by a mask that a small CNN makes for each image, is added.

    The CNN has five 3 x 3 convolutions (8, 16, 32, 64 and 3 channels) and three max-pools, so that its three-channel
    mask has one value for each cell of 8 x 8 pixels. The pattern starts at zero. Both work in normalised pixels.

    Source: Cai et al., ICML 2024, arXiv:2406.03150, and its code (github.com/tmlr-group/SMM). Published: Adam, rate
    0.01 for the pattern, and 0.01 (ResNets) or 0.001 (ViT-B/32, with one layer more) for the CNN; 200 epochs.
    """

    def __init__(self, side: int, scale: Scale) -> None:
        super().__init__(side, scale)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate([(3, 8), (8, 16), (16, 32), (32, 64)]):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index < 3 else []
        self.cnn = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))
        self.pattern = nn.Parameter(torch.zeros(3, side, side))

    def mask(self, pixels: Tensor) -> Tensor:
        """Make the mask (B, 3, H, W) of images (B, 3, H, W) in [0, 1]."""
        cells = self.cnn(normalize(pixels, *self.scale)).float()  # (B, 3, H / 8, W / 8)
        return F.interpolate(cells, size=pixels.shape[-2:], mode="nearest")

    def change(self, pixels: Tensor) -> Tensor:
        """Add the masked pattern."""
        return pixels + self.pixels_of(self.pattern * self.mask(pixels))


class LowRank(PixelPrompt):
    """LoR-VP: a full-image pattern B @ A of rank 4 for each channel is added.

    B starts at zero, A random normal.

    Source: Jin et al., ICLR 2025, arXiv:2502.00896, and its code (github.com/jincan333/LoR-VP). Published: SGD with
    momentum 0.9, rate 0.02, 20 epochs. Its script draws A with a standard deviation of 0.01 and its module offers 1;
    under AdamW, whose steps do not depend on the scale of a gradient, we use 0.01 as the script does.
    """

    def __init__(self, side: int, scale: Scale, rank: int = 4, std: float = 0.01) -> None:
        super().__init__(side, scale)
        self.left = nn.Parameter(torch.zeros(3, side, rank))
        self.right = nn.Parameter(torch.randn(3, rank, side) * std)

    def change(self, pixels: Tensor) -> Tensor:
        """Add the pattern."""
        # As a sum of products: autocast would compute a matrix product in bfloat16.
        return pixels + (self.left[..., None] * self.right[:, None]).sum(2)


PEERS: dict[str, tuple[type[PixelPrompt], tuple[float, float]]] = {
    "border": (Border, (0.03, 0.1)),
    "smm": (Masked, (0.01, 0.03)),
    "lor-vp": (LowRank, (0.02, 0.006)),
}
