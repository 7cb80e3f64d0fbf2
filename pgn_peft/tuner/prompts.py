"""The prompts of one adapter: generated from images, and appended to the tokens or added to the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.heads import TextHead
from pgn_peft.nn.images import through_jpeg
from pgn_peft.nn.layout import PromptLayout, compose, make_layout
from pgn_peft.nn.library import AdditiveLibrary, TokenLibrary
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils import not_none


def make_library(config: PGNConfig, directions: Tensor | None = None) -> TokenLibrary | AdditiveLibrary:
    """Create the library of a resolved config; for the "static" generator it is the prompts themselves.

    Args:
        config: the adapter's.
        directions: (C, p, p, D) of an `AdditiveLibrary`.
    """
    generated, hidden_size = config.generator != "static", not_none(config.hidden_size)
    if config.prompt_space == "pixel":
        return AdditiveLibrary(config.library_size if generated else 1, hidden_size, directions)
    return TokenLibrary(
        config.library_size if generated else not_none(config.num_virtual_tokens),
        hidden_size,
        initializer_range=config.initializer_range,
        num_slots=config.num_virtual_tokens if config.static_prompts else None,
        depth=cast(int, config.prompt_depth),
        first_layer_only=bool(config.accumulate_prompts),
    )


def make_generator(config: PGNConfig) -> PromptGenerator | None:
    """Create the generator of a resolved config; None for "static"."""
    if config.generator == "static":
        return None
    return PromptGenerator(
        not_none(config.num_virtual_tokens),
        config.library_size,
        trunk=config.generator,
        num_channels=not_none(config.num_channels),
        image_size=config.generator_image_size,
        width=config.generator_width,
        norm=config.generator_norm,
        mixing_init_std=not_none(config.mixing_init_std),
        rank=config.generator_rank,
        patch_size=config.patch_size if config.prompt_space == "pixel" else None,
    )


def make_head(config: PGNConfig) -> nn.Linear | TextHead | None:
    """Create the head of a resolved config; None where the model's own is used, or there are no labels."""
    if config.head == "frozen" or config.num_labels is None:
        return None
    num_features = config.head_features or not_none(config.hidden_size)
    if config.head == "text":
        return TextHead(num_features, config.num_labels)
    head = nn.Linear(num_features, config.num_labels)
    # As Transformers' ViTs initialise a new head.
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def describe_modules(config: PGNConfig) -> dict[str, nn.Module]:
    """Make an adapter's modules on the meta device, by the names of the containers that hold them."""
    with torch.device("meta"):
        modules = {
            "pgn_library": make_library(config),
            "pgn_generator": make_generator(config),
            "pgn_head": make_head(config),
        }
    return {name: module for name, module in modules.items() if module is not None}


@dataclass(frozen=True)
class LatentPrompts:
    """Prompts that are tokens, appended to those of the image.

    Args:
        config: the adapter's.
        library: of tokens.
        generator: maps images to mixing coefficients; None: all images have the same prompts.

    Source: arXiv:2210.06466.
    """

    config: PGNConfig
    library: TokenLibrary
    generator: PromptGenerator | None

    def generate(self, pixel_values: Tensor) -> Tensor:
        """Generate the prompts of images (B, C, H, W): (B, depth * P, D), layer by layer."""
        if self.generator is None:
            return self.library.all_entries(len(pixel_values))
        coefficients = mixing_coefficients(self.generator, self.config, pixel_values)
        return self.library(coefficients)

    def images(self, pixel_values: Tensor) -> Tensor:
        """Return the images that the backbone embeds: unchanged."""
        return pixel_values


@dataclass(frozen=True)
class PixelPrompts:
    """Prompts that are added to the image, which the backbone then embeds as a hosted model does.

    Args:
        config: the adapter's.
        library: of changes of patches.
        generator: maps images to mixing coefficients; None: all patches of all images have the same change.
    """

    config: PGNConfig
    library: AdditiveLibrary
    generator: PromptGenerator | None

    def layout(self, image_size: tuple[int, int]) -> PromptLayout:
        """Return the layout for images of some height and width, in pixels."""
        return make_layout("additive", image_size, not_none(self.config.patch_size))

    def generate(self, pixel_values: Tensor) -> Tensor:
        """Generate the changes (B, P, C, p, p) of the patches of normalised images (B, C, H, W), for [0, 1]."""
        if self.generator is None:
            number = self.layout((pixel_values.shape[-2], pixel_values.shape[-1])).num_virtual_tokens
            return self.library.all_entries(len(pixel_values)).expand(-1, number, -1, -1, -1)
        coefficients = mixing_coefficients(self.generator, self.config, pixel_values)
        return self.library(coefficients)

    def images(self, pixel_values: Tensor) -> Tensor:
        """Add the prompts to normalised images (B, C, H, W); the result holds 8-bit pixels, normalised."""
        mean, std = not_none(self.config.image_mean), not_none(self.config.image_std)
        layout = self.layout((pixel_values.shape[-2], pixel_values.shape[-1]))
        # Always in float32: half precision does not hold 8 bits of a normalised pixel.
        pixels = denormalize(pixel_values.float(), mean, std)
        prompted = compose(pixels, self.generate(pixel_values).float(), layout)
        if self.library.training and self.config.jpeg_quality is not None:
            # Half of the images: prompts that only saw JPEG are 8 points worse without it.
            encoded = torch.rand(len(prompted), 1, 1, 1, device=prompted.device) < 0.5
            prompted = torch.where(encoded, through_jpeg(prompted, self.config.jpeg_quality), prompted)
        return normalize(prompted, mean, std).to(pixel_values.dtype)


def mixing_coefficients(generator: PromptGenerator, config: PGNConfig, pixel_values: Tensor) -> Tensor:
    """Compute the coefficients (B, P, L) of images (B, C, H, W), some of them the mean of the batch in training."""
    coefficients = generator(pixel_values)
    share = not_none(config.prompt_dropout)
    if generator.training and share > 0:
        dropped = torch.rand(len(coefficients), 1, 1, device=coefficients.device) < share
        coefficients = torch.where(dropped, coefficients.mean(dim=0, keepdim=True), coefficients)
    return coefficients
