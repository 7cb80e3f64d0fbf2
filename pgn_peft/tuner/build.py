"""Generator, library and head, made as a config describes them."""

from __future__ import annotations

from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import AdditiveLibrary, PatchLibrary, TokenLibrary
from pgn_peft.nn.text_head import TextHead
from pgn_peft.tuner.fields import PGNFields
from pgn_peft.utils.values import filled


def make_library(
    config: PGNFields, hidden_size: int, num_channels: int, directions: Tensor | None = None
) -> TokenLibrary | PatchLibrary | AdditiveLibrary:
    """Create the library that a config describes; for the "static" generator it is the prompts themselves."""
    size = filled(config.num_virtual_tokens) if config.generator == "static" else config.library_size
    if config.prompt_layout == "dense":
        return AdditiveLibrary(1 if config.generator == "static" else size, hidden_size, directions)
    if config.prompt_space == "pixel":
        return PatchLibrary(
            size,
            num_channels,
            filled(config.patch_size),
            hidden_size,
            initializer_range=config.initializer_range,
            directions=directions,
            image_offset=bool(config.image_offset),
        )
    slots = config.num_virtual_tokens if config.slot_prompts else None
    return TokenLibrary(
        size,
        hidden_size,
        initializer_range=config.initializer_range,
        num_slots=slots,
        depth=config.prompt_depth or 1,
    )


def make_head(config: PGNFields) -> nn.Linear | TextHead:
    """Create the head that a config describes, with new weights; not for head="frozen"."""
    num_features = config.head_features or filled(config.hidden_size)
    if config.head == "text":
        return TextHead(num_features, filled(config.num_labels))
    head = nn.Linear(num_features, filled(config.num_labels))
    # As Transformers' ViTs initialise a new head.
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def make_generator(config: PGNFields, num_channels: int) -> PromptGenerator | None:
    """Create the generator that a config describes; None for "static"."""
    if config.generator == "static":
        return None
    return PromptGenerator(
        filled(config.num_virtual_tokens),
        config.library_size,
        trunk=config.generator,
        num_channels=num_channels,
        image_size=config.generator_image_size,
        width=config.generator_width,
        norm=config.generator_norm,
        mixing=config.mixing,
        initial_logit_std=filled(config.initial_logit_std),
        rank=config.generator_rank,
        patch_size=config.patch_size if config.prompt_layout == "dense" else None,
    )
