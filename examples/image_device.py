"""The augmentation of `train_image_classifier.py` for a batch at once, where the model is: `--augment_on device`.

The same operations as `AUGMENTATIONS`, after resizing rather than before it, on floats rather than on 8 bits. Each
image has random numbers of its own, which are drawn on the CPU: checkpoints keep its generator, and a GPU never waits.

Source: torchvision's `ColorJitter`, `RandomGrayscale`, `RandomSolarize` and `adjust_hue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.preprocessing import denormalize, normalize

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
LUMA = (0.2989, 0.587, 0.114)


def augment(pixels: Tensor, augmentation: str) -> Tensor:
    """Augment images, each in its own way.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        augmentation: "official", "flip" or "none".

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    if augmentation == "none":
        return pixels
    pixels = torch.where(_chosen(0.5, pixels), pixels.flip(-1), pixels)
    if augmentation == "flip":
        return pixels
    pixels = jitter(pixels, *draw_jitter(len(pixels)))
    pixels = torch.where(_chosen(0.2, pixels), _gray(pixels), pixels)
    solarized = torch.where(pixels >= 128 / 255, 1 - pixels, pixels)
    return torch.where(_chosen(0.2, pixels), solarized, pixels)


def draw_jitter(count: int, share: float = 0.8) -> tuple[Tensor, Tensor]:
    """Draw how the colours of `count` images change.

    Returns:
        (B, 4) factors of brightness, contrast, saturation and hue; (B, 4) the order of the four, -1 for an image that
        stays as it is.
    """
    widths = torch.tensor(list(JITTER.values()))
    factors = (2 * torch.rand(count, 4) - 1) * widths + torch.tensor([1.0, 1.0, 1.0, 0.0])
    order = torch.rand(count, 4).argsort(dim=1)
    return factors, torch.where(torch.rand(count, 1) < share, order, -1)


def jitter(pixels: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image by its own factors and in its own order.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        factors: (B, 4), on the CPU.
        order: (B, 4), on the CPU: which of the four comes first, second, third and fourth.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    pixels = pixels.clone()
    for place in range(4):
        for index, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = (order[:, place] == index).nonzero().flatten()
            if len(rows):
                factor = factors[rows, index].to(pixels)[:, None, None, None]
                rows = rows.to(pixels.device)
                pixels[rows] = change(pixels[rows], factor)
    return pixels


def _chosen(share: float, pixels: Tensor) -> Tensor:
    return (torch.rand(len(pixels), 1, 1, 1) < share).to(pixels.device)


def _gray(pixels: Tensor) -> Tensor:
    return (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 1)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(pixels).mean((-1, -2), keepdim=True)
    return (factor * pixels + (1 - factor) * mean).clamp(0, 1)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return (factor * pixels + (1 - factor) * _gray(pixels)).clamp(0, 1)


def _hue(pixels: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)  # each (B, H, W)
    value, low = pixels.amax(1), pixels.amin(1)
    spread = value - low
    divisor = torch.where(spread == 0, 1, spread)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * factor[:, 0]
    # And back: a channel is value - spread * clamp(min(k, 4 - k), 0, 1), where k = (n + hue) mod 6 and n = 5, 3, 1.
    k = (pixels.new_tensor([5.0, 3.0, 1.0])[:, None, None] + hue[:, None]) % 6
    return value[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


@dataclass
class DeviceAugmentation:
    """Augments what a model is given in training, as a pre-hook of its forward: `attach(model)`.

    Args:
        augmentation: "official", "flip" or "none".
        image_mean: that `pixel_values` are normalised with.
        image_std: likewise.
    """

    augmentation: str
    image_mean: list[float]
    image_std: list[float]

    def attach(self, model: nn.Module) -> None:
        """Augment whatever this model sees from now on in training mode."""
        model.register_forward_pre_hook(self, with_kwargs=True)

    @torch.no_grad()
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Augment `pixel_values` (B, 3, H, W), normalised, if the model is in training mode."""
        if model.training:
            pixels = denormalize(kwargs["pixel_values"].float(), self.image_mean, self.image_std).clamp(0, 1)
            changed = normalize(augment(pixels, self.augmentation), self.image_mean, self.image_std)
            kwargs["pixel_values"] = changed.to(kwargs["pixel_values"].dtype)
        return args, kwargs
