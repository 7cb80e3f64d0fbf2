"""The files of a prompter: prompter.safetensors, and prompter_config.json, which describes its tensors."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.layout import PromptLayout, make_layout
from pgn_peft.nn.preprocessing import Preprocessing
from pgn_peft.prompter.answers import SCALES
from pgn_peft.prompter.score_head import KINDS, EmbeddingHead, ScoreHead, ScoreHeadReport, one_to_one_head
from pgn_peft.utils.files import compare_tensors, read_settings, replacing
from pgn_peft.utils.labels import normalize_id2label

CONFIG_FILE = "prompter_config.json"
WEIGHTS_FILE = "prompter.safetensors"
# The layout of prompts that are added to the image's patches, and its names in files. Others append prompts.
ADDITIVE = "additive"
ADDITIVE_IN_FILES = ("additive", "dense")
# Most numbers in an image, and in all tensors together, that a file may ask for: 1 GiB of float32.
LARGEST_SIZE = 2**28


def write_files(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, which is made.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replacing(folder) as staged:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / WEIGHTS_FILE)
        staged.joinpath(CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


# What is raised by code that reads a file of another structure.
READ_ERRORS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, SafetensorError)


@contextmanager
def naming(file: Path, part: str) -> Iterator[None]:
    """Turn every error from reading a part of a file into a ValueError that names both.

    Raises:
        ValueError: the part is missing, has another structure, or a value of the wrong type or out of range.
    """
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(
            f"{file}: {part} cannot be read ({type(error).__name__}: {error}). Correct it, or save or fetch the "
            "prompter again."
        ) from error


def read_config(file: Path) -> dict[str, Any]:
    """Make the arguments of `ImagePrompter` from prompter_config.json; the other file's tensors are meta.

    Raises:
        ValueError: the file is no JSON object, or a part of it cannot be read.
    """
    settings = read_settings(file)
    with naming(file, "`preprocessing`"):
        preprocessing = _read_preprocessing(settings["preprocessing"])
        channels = len(preprocessing.image_mean)
    with naming(file, "`layout`"):
        layout = _read_layout(settings)
    with naming(file, "`generator`"):
        generator = _read_generator(settings["generator"], channels, layout)
    with naming(file, "`server_labels`, `id2label`, `probe`, `head` or `score_head`"), torch.device("meta"):
        id2label, server_labels = (_read_labels(settings[name]) for name in ("id2label", "server_labels"))
        probe_scores = torch.empty(len(server_labels or {})) if settings["probe"] else None
        head: nn.Linear | None = None
        if settings["head"] is not None:
            kind = EmbeddingHead if settings.get("normalized_features") else nn.Linear
            head = kind(settings["head"][1], settings["head"][0])
        score_head = _read_score_head(settings, len(id2label or {}), list((server_labels or {}).values()))
    patch = (channels, layout.patch_size, layout.patch_size)
    number = layout.num_virtual_tokens if generator is None else generator.library_size
    if generator is None and layout.name == ADDITIVE:
        number = 1  # for all patches
    shape = (layout.num_virtual_tokens, number) if settings.get("library_per_slot") else (number,)
    exact = not settings.get("in_range", True)
    with torch.device("meta"):
        arguments: dict[str, Any] = {
            "library": torch.empty(*shape, *patch),
            "offsets": torch.empty(layout.num_virtual_tokens, *patch) if exact else None,
            "image_offset": torch.empty(channels, *layout.image_size) if exact else None,
        }
    return arguments | {
        "layout": layout,
        "preprocessing": preprocessing,
        "generator": generator,
        "id2label": id2label,
        "server_labels": server_labels,
        "head": head,
        "probe_scores": probe_scores,
        "score_head": score_head,
    }


def read_tensors(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors that the configuration declares, and convert them to the expected dtypes.

    Args:
        file: prompter.safetensors.
        expected: tensors of the same names and shapes; on the meta device if the file has to have them.

    Raises:
        ValueError: the file is damaged, or holds other tensors.
    """
    _check_size(sum(tensor.numel() for tensor in expected.values()))
    with naming(file, "the file"):
        tensors = {name: tensor for name, tensor in expected.items() if not tensor.is_meta} | load_file(file)
    for name in expected:
        # BatchNorm counts training steps there. Tools convert and average it with the weights; nothing reads it.
        if name.endswith(".num_batches_tracked"):
            tensors[name] = torch.zeros_like(expected[name], device="cpu")
    compare_tensors(expected, tensors, str(file))
    return {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}


def _check_size(number: int) -> None:
    if number > LARGEST_SIZE:
        raise ValueError(f"{number:,} numbers in one image, or in all tensors, are more than {LARGEST_SIZE:,}.")


def _read_size(size: Any) -> tuple[int, int]:
    height, width = map(int, size)
    _check_size(3 * height * width)
    return height, width


def _read_preprocessing(settings: dict[str, Any]) -> Preprocessing:
    size, shortest_edge, crop_size = (settings[name] for name in ("size", "shortest_edge", "crop_size"))
    if shortest_edge is not None:
        _read_size((shortest_edge, shortest_edge))
    return Preprocessing(
        image_mean=tuple(map(float, settings["image_mean"])),
        image_std=tuple(map(float, settings["image_std"])),
        size=None if size is None else _read_size(size),
        shortest_edge=shortest_edge,
        resample=settings["resample"],
        crop_size=None if crop_size is None else _read_size(crop_size),
    )


def _read_layout(settings: dict[str, Any]) -> PromptLayout:
    layout = settings["layout"]
    name = ADDITIVE if layout["name"] in ADDITIVE_IN_FILES else layout["name"]
    if name == "canvas" or (settings.get("image_offset") and settings["in_range"]):
        raise ValueError(
            "prompts that were trained as pixels around the image are no longer supported: train the adapter again "
            "with the additive layout"
        )
    return make_layout(name, _read_size(layout["image_size"]), layout["patch_size"], layout["num_virtual_tokens"])


def _read_generator(settings: dict[str, Any] | None, channels: int, layout: PromptLayout) -> PromptGenerator | None:
    if settings is None:
        return None
    if settings.get("mixing", "softmax") != "softmax":
        raise ValueError(f"mixing={settings['mixing']!r} was removed")
    if settings["image_size"] is not None:
        _read_size((settings["image_size"],) * 2)
    arguments = {name: settings[name] for name in inspect.signature(PromptGenerator).parameters if name in settings}
    patch_size = layout.patch_size if layout.name == ADDITIVE else None
    with torch.device("meta"):
        return PromptGenerator(**arguments | {"num_channels": channels, "patch_size": patch_size})


def _read_labels(labels: dict[str, str] | None) -> dict[int, str] | None:
    return None if labels is None else normalize_id2label(labels)


def _read_score_head(settings: dict[str, Any], num_labels: int, server_labels: list[str]) -> ScoreHead | None:
    described = settings.get("score_head")
    if described is None:
        if settings.get("label_mapping") is None:
            return None
        with torch.device("cpu"):  # files of earlier versions have no tensors of it
            return one_to_one_head(settings["label_mapping"], server_labels)
    report = ScoreHeadReport(**{field.name: described[field.name] for field in dataclasses.fields(ScoreHeadReport)})
    if report.kind not in KINDS or described["scale"] not in (None, *SCALES):
        raise ValueError(f"kind {report.kind!r} or scale {described['scale']!r} is unknown")
    labels = list(map(str, described["labels"]))
    return ScoreHead(torch.empty(num_labels, len(labels)), torch.empty(num_labels), labels, report, described["scale"])
