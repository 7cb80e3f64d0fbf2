"""The files of a prompter: prompter.safetensors, and prompter_config.json, which describes its tensors."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.layout import PromptLayout, make_layout
from pgn_peft.nn.preprocessing import Adjustment, Preprocessing
from pgn_peft.prompter.score_head import EmbeddingHead, ScoreHead, ScoreHeadReport, one_to_one_head
from pgn_peft.utils.files import compare_tensors, replacing
from pgn_peft.utils.labels import normalize_id2label

CONFIG_FILE = "prompter_config.json"
WEIGHTS_FILE = "prompter.safetensors"
# The layout of prompts that are added to the image's patches, and its names in files. Others append prompts.
ADDITIVE = "additive"
ADDITIVE_IN_FILES = ("additive", "dense")
# Most numbers in an image, and in all tensors together, that a file may ask for: 1 GiB of float32.
LARGEST_SIZE = 2**28


def write_files(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, which is made."""
    with replacing(folder) as staged:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / WEIGHTS_FILE)
        staged.joinpath(CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read_files(folder: Path, make: Callable[..., nn.Module]) -> nn.Module:
    """Read both files of a folder.

    Args:
        folder: untrusted files. No memory is taken for tensors that they only announce.
        make: `ImagePrompter`.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, does not fit the other one, or asks for images of an absurd size.
    """
    try:
        with torch.device("meta"):
            prompter = make(**_read_settings(json.loads(folder.joinpath(CONFIG_FILE).read_bytes())))
        expected = prompter.state_dict()
        _check_size(sum(tensor.numel() for tensor in expected.values()))
        tensors = {name: tensor for name, tensor in expected.items() if not tensor.is_meta}
        tensors |= load_file(folder / WEIGHTS_FILE)
        for name in expected:
            # BatchNorm counts training steps there. Tools convert and average it with the weights; nothing reads it.
            if name.endswith(".num_batches_tracked"):
                tensors[name] = torch.zeros_like(expected[name], device="cpu")
        compare_tensors(expected, tensors, WEIGHTS_FILE)
        converted = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
        prompter.load_state_dict(converted, assign=True)
    except OSError:
        raise
    except Exception as error:  # an untrusted file can have any structure
        raise ValueError(f"The prompter in {folder} cannot be read ({type(error).__name__}: {error}).") from error
    return prompter.requires_grad_(False).eval()


def _check_size(number: int) -> None:
    if number > LARGEST_SIZE:
        raise ValueError(f"{number:,} numbers in one image, or in all tensors, are more than {LARGEST_SIZE:,}.")


def _read_settings(settings: dict[str, Any]) -> dict[str, Any]:
    preprocessing, generator_settings = _read_preprocessing(settings["preprocessing"]), settings["generator"]
    channels, edge = len(preprocessing.image_mean), (generator_settings or {}).get("image_size")
    sizes = (settings["layout"]["image_size"], preprocessing.size, preprocessing.crop_size)
    edges = (preprocessing.shortest_edge, edge)
    _check_size(channels * max([prod(size) for size in sizes if size] + [edge**2 for edge in edges if edge]))
    layout = _read_layout(settings)
    generator, number = None, 1 if layout.name == ADDITIVE else layout.num_virtual_tokens
    if generator_settings is not None:
        if generator_settings.get("mixing", "softmax") != "softmax":
            raise ValueError(f"mixing={generator_settings['mixing']!r} was removed")
        known = generator_settings.keys() & inspect.signature(PromptGenerator).parameters.keys()
        patch_size = layout.patch_size if layout.name == ADDITIVE else None
        arguments = {name: generator_settings[name] for name in known}
        generator = PromptGenerator(**arguments | {"num_channels": channels, "patch_size": patch_size})
        number = generator.library_size
    id2label, server_labels = (
        None if settings[name] is None else normalize_id2label(settings[name])
        for name in ("id2label", "server_labels")
    )
    head: nn.Linear | None = None
    if settings["head"] is not None:
        kind = EmbeddingHead if settings.get("normalized_features") else nn.Linear
        head = kind(settings["head"][1], settings["head"][0])
    shape = (layout.num_virtual_tokens, number) if settings.get("library_per_slot") else (number,)
    patch = (channels, layout.patch_size, layout.patch_size)
    exact = not settings.get("in_range", True)
    return {
        "layout": layout,
        "preprocessing": preprocessing,
        "adjustment": Adjustment(**settings.get("adjustment", {})),  # files of earlier versions have none
        "library": torch.empty(*shape, *patch),
        "offsets": torch.empty(layout.num_virtual_tokens, *patch) if exact else None,
        "image_offset": torch.empty(channels, *layout.image_size) if exact else None,
        "generator": generator,
        "id2label": id2label,
        "server_labels": server_labels,
        "head": head,
        "probe_scores": torch.empty(len(server_labels or {})) if settings["probe"] else None,
        "score_head": _read_score_head(settings, len(id2label or {}), list((server_labels or {}).values())),
    }


def _read_preprocessing(settings: dict[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Preprocessing):
        value = settings[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return Preprocessing(**values)


def _read_layout(settings: dict[str, Any]) -> PromptLayout:
    layout = settings["layout"]
    if layout["name"] == "canvas" or (settings.get("image_offset") and settings["in_range"]):
        raise ValueError(
            "prompts that were trained as pixels around the image are no longer supported: train the adapter again "
            "with the additive layout"
        )
    name = ADDITIVE if layout["name"] in ADDITIVE_IN_FILES else layout["name"]
    return make_layout(name, tuple(layout["image_size"]), layout["patch_size"], layout["num_virtual_tokens"])


def _read_score_head(settings: dict[str, Any], num_labels: int, server_labels: list[str]) -> ScoreHead | None:
    described = settings.get("score_head")
    if described is None:
        if settings.get("label_mapping") is None:
            return None
        with torch.device("cpu"):  # files of earlier versions have no tensors of it
            return one_to_one_head(settings["label_mapping"], server_labels)
    report = ScoreHeadReport(**{field.name: described[field.name] for field in dataclasses.fields(ScoreHeadReport)})
    labels = described["labels"]
    return ScoreHead(torch.empty(num_labels, len(labels)), torch.empty(num_labels), labels, report, described["scale"])
