"""The content of prompter_config.json: written from the parts of an `ImagePrompter`, read as an untrusted file."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from pgn_peft.nn.generator import MIXINGS, PromptGenerator
from pgn_peft.nn.layout import LAYOUTS, PromptLayout, make_layout
from pgn_peft.nn.pixel_prompts import PixelPrompts
from pgn_peft.nn.preprocessing import RESAMPLING, Preprocessing
from pgn_peft.nn.trunk import NORMS, TRUNKS
from pgn_peft.prompter.embedding_head import EmbeddingHead
from pgn_peft.prompter.score_head import KINDS, ScoreHead, ScoreHeadReport
from pgn_peft.prompter.score_scale import SCALES
from pgn_peft.utils.labels import normalize_id2label
from pgn_peft.utils.values import (
    check_choice,
    filled,
    read_channel_values,
    read_indices,
    read_integer,
    read_pair,
)

# Upper bounds, far beyond what is used, so that no file can make the client allocate large tensors.
LARGEST_SIDE, LARGEST_LIBRARY, LARGEST_WIDTH = 4096, 65_536, 1024


def describe_layout(layout: PromptLayout) -> dict[str, Any]:
    """Describe a layout, for `read_parts`."""
    return {
        "name": layout.name,
        "image_size": list(layout.input_size),
        "patch_size": layout.patch_size,
        "num_virtual_tokens": layout.num_virtual_tokens,
    }


def describe_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """Describe the steps of an image processor, for `read_parts`."""
    return dataclasses.asdict(preprocessing)


def describe_score_head(head: ScoreHead) -> dict[str, Any]:
    """Describe a head on scores, for `read_parts`."""
    return {"labels": head.labels, "scale": head.scale, **dataclasses.asdict(head.report)}


def read_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments of `ImagePrompter` from a configuration, all tensors on the meta device.

    Raises:
        KeyError, AttributeError: a setting is missing, or has another structure.
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """
    layout, channels = _read_layout(settings["layout"]), len(settings["preprocessing"]["image_mean"])
    preprocessing = _read_preprocessing(settings["preprocessing"])
    generator, library_size = _read_generator(
        settings["generator"], channels, layout.patch_size if layout.name == "dense" else None
    )
    num_prompts = layout.num_virtual_tokens
    patch = (channels, layout.patch_size, layout.patch_size)
    with torch.device("meta"):
        if generator is None:
            library = torch.empty(1 if layout.name == "dense" else num_prompts, *patch)
        elif settings["library_per_slot"]:
            library = torch.empty(num_prompts, library_size, *patch)
        else:
            library = torch.empty(library_size, *patch)
        exact = not settings["in_range"]
        offsets = torch.empty(num_prompts, *patch) if exact else None
        size = layout.image_size if exact else patch[1:]
        image_offset = torch.empty(channels, *size) if settings["image_offset"] else None
        head = None
        if settings["head"] is not None:
            num_labels, width = read_pair("head", settings["head"], 1_000_000)
            head = (EmbeddingHead if settings.get("normalized_features") else nn.Linear)(width, num_labels)
        server_labels = _read_labels(settings["server_labels"])
        probe_scores = torch.empty(len(filled(server_labels))) if settings["probe"] else None
    id2label, label_mapping = _read_labels(settings["id2label"]), settings["label_mapping"]
    described = settings.get("score_head")
    score_head = None if described is None else _read_score_head(described, len(filled(id2label)))
    if label_mapping is not None:
        label_mapping = read_indices("label_mapping", label_mapping)
        own, others = len(filled(id2label)), len(filled(server_labels))  # TypeError for None
        if len(label_mapping) != own or max(label_mapping) >= others:
            raise ValueError(
                f"`label_mapping` must map the {own} classes to the server's {others}, but got {label_mapping}. "
                "Save or fetch the prompter again."
            )
    return {
        "layout": layout,
        "preprocessing": preprocessing,
        "prompts": PixelPrompts(library, offsets, image_offset),
        "generator": generator,
        "id2label": id2label,
        "label_mapping": label_mapping,
        "server_labels": server_labels,
        "head": head,
        "probe_scores": probe_scores,
        "score_head": score_head,
    }


def _read_labels(labels: dict[str, str] | None) -> dict[int, str] | None:
    return None if labels is None else normalize_id2label(labels)


def _read_score_head(settings: dict[str, Any], num_labels: int) -> ScoreHead:
    def number(name: str, largest: float) -> float | None:
        value = settings[name]
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= largest):
            raise ValueError(
                f"`{name}` must lie in 0..{largest}, but got {value!r}. Save or fetch the prompter again."
            )
        return value

    check_choice("kind", settings["kind"], KINDS)
    if settings["scale"] is not None:
        check_choice("scale", settings["scale"], SCALES)
    labels = list(normalize_id2label(dict(enumerate(settings["labels"]))).values())
    report = ScoreHeadReport(
        settings["kind"],
        read_integer("top_k", settings["top_k"], 1, len(labels), optional=True),
        read_integer("digits", settings["digits"], 1, 1000, optional=True),
        read_integer("rank", settings["rank"], 1, 1_000_000, optional=True),
        number("condition_number", 1e30),
        number("accuracy", 1.0),
    )
    with torch.device("meta"):
        return ScoreHead(
            torch.empty(num_labels, len(labels)), torch.empty(num_labels), labels, report, settings["scale"]
        )


def _read_layout(settings: dict[str, Any]) -> PromptLayout:
    check_choice("prompt_layout", settings["name"], LAYOUTS)
    image_size = read_pair("image_size", settings["image_size"], LARGEST_SIDE)
    patch_size = read_integer("patch_size", settings["patch_size"], 1, LARGEST_SIDE)
    num_prompts = read_integer("num_virtual_tokens", settings["num_virtual_tokens"], 1, LARGEST_LIBRARY)
    return make_layout(settings["name"], image_size, patch_size, num_prompts)


def _read_preprocessing(settings: dict[str, Any]) -> Preprocessing:
    def size(name: str) -> tuple[int, int] | None:
        return None if settings[name] is None else read_pair(name, settings[name], LARGEST_SIDE)

    check_choice("resample", settings["resample"], tuple(RESAMPLING.values()))
    return Preprocessing(
        image_mean=tuple(read_channel_values("image_mean", settings["image_mean"], positive=False)),
        image_std=tuple(read_channel_values("image_std", settings["image_std"], positive=True)),
        size=size("size"),
        shortest_edge=read_integer("shortest_edge", settings["shortest_edge"], 1, LARGEST_SIDE, optional=True),
        resample=settings["resample"],
        crop_size=size("crop_size"),
    )


def _read_generator(
    settings: dict[str, Any] | None, channels: int, patch_size: int | None
) -> tuple[PromptGenerator | None, int]:
    if settings is None:
        return None, 0
    check_choice("trunk", settings["trunk"], tuple(TRUNKS))
    check_choice("norm", settings["norm"], tuple(NORMS))
    check_choice("mixing", settings["mixing"], tuple(MIXINGS))
    library_size = read_integer("library_size", settings["library_size"], 1, LARGEST_LIBRARY)
    with torch.device("meta"):
        generator = PromptGenerator(
            read_integer("num_virtual_tokens", settings["num_virtual_tokens"], 1, LARGEST_LIBRARY),
            library_size,
            trunk=settings["trunk"],
            num_channels=channels,
            image_size=read_integer("image_size", settings["image_size"], 8, LARGEST_SIDE, optional=True),
            width=read_integer("width", settings["width"], 4, LARGEST_WIDTH),
            norm=settings["norm"],
            mixing=settings["mixing"],
            rank=read_integer("rank", settings["rank"], 1, LARGEST_WIDTH, optional=True),
            patch_size=patch_size,
        )
    return generator, library_size
