"""The files of an `ImagePrompter`: prompter.safetensors, and prompter_config.json, which says what must be in it.

A file is believed in nothing but tensors of the declared shapes. Imports nothing of a Hub until one is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pgn_peft.checks import check_channel_values, check_choice, check_indices, check_integer, check_pair
from pgn_peft.checksums import FIELD, compare_file, compare_settings, record
from pgn_peft.files import finish_save, is_folder, read_settings, replacing
from pgn_peft.generator import MIXINGS, NORMS, TRUNKS, PromptGenerator
from pgn_peft.inversion import PixelPrompts
from pgn_peft.labels import normalize_id2label
from pgn_peft.layout import LAYOUTS, PromptLayout, make_layout
from pgn_peft.preprocessing import RESAMPLING, Preprocessing
from pgn_peft.prompter_card import make_prompter_card
from pgn_peft.tensors import compare_tensors
from pgn_peft.version import __version__

if TYPE_CHECKING:
    from pgn_peft.prompter import ImagePrompter

CONFIG_FILE = "prompter_config.json"
WEIGHTS_FILE = "prompter.safetensors"
# Bounds that keep a file from taking all memory; far beyond what is used.
LARGEST_SIDE, LARGEST_LIBRARY, LARGEST_WIDTH = 4096, 65_536, 1024


def save(prompter: ImagePrompter, folder: Path) -> None:
    """Write both files into a folder, which is made.

    Raises:
        OSError: the folder cannot be written to.
    """
    tensors = {name: tensor.contiguous() for name, tensor in prompter.state_dict().items()}
    with replacing(folder) as staged:
        save_file(tensors, staged / WEIGHTS_FILE)
        staged.joinpath(CONFIG_FILE).write_text(json.dumps(_describe(prompter)), encoding="utf-8")
        record(staged / CONFIG_FILE, [staged / WEIGHTS_FILE])


def _describe(prompter: ImagePrompter) -> dict[str, Any]:
    layout = prompter.layout
    return {
        "pgn_peft_version": __version__,
        "layout": {
            "name": layout.name,
            "image_size": list(layout.input_size),
            "patch_size": layout.patch_size,
            "num_virtual_tokens": layout.num_virtual_tokens,
        },
        "preprocessing": dataclasses.asdict(prompter.preprocessing),
        "generator": None if prompter.generator is None else prompter.generator.settings,
        "library_per_slot": prompter.library.ndim == 5,
        "in_range": prompter.in_range,
        "image_offset": prompter.image_offset is not None,
        "head": None if prompter.head is None else list(prompter.head.weight.shape),
        "probe": prompter.probe_scores is not None,
        "id2label": prompter.id2label,
        "label_mapping": prompter.label_mapping,
        "server_labels": prompter.server_labels,
    }


def load(cls: type[ImagePrompter], folder: Path) -> ImagePrompter:
    """Read a prompter back.

    Raises:
        OSError: a file is not there.
        ValueError: one is damaged, or they do not belong together.
    """
    settings = read_settings(folder / CONFIG_FILE)
    try:
        prompter = _build(cls, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{folder / CONFIG_FILE}` must be the configuration of a prompter, but got {type(error).__name__}: "
            f"{error}. Save or fetch the prompter again."
        ) from error
    compare_settings(settings, CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"`{file}` must be a complete safetensors file, but got: {error}. Save or fetch the prompter again."
        ) from error
    compare_tensors(prompter.state_dict(), tensors, str(file))
    for name, expected in prompter.state_dict().items():
        if tensors[name].dtype != expected.dtype:
            raise ValueError(
                f"`{file}` must hold {name} as {expected.dtype}, but got {tensors[name].dtype}. Save the prompter "
                "again."
            )
    compare_file(file, settings.get(FIELD), CONFIG_FILE)
    prompter.load_state_dict(tensors, assign=True)
    return prompter.requires_grad_(False).eval()


def _build(cls: type[ImagePrompter], config: dict[str, Any]) -> ImagePrompter:
    """Make a prompter without weights, on the meta device, from a configuration that is not trusted."""
    layout, channels = _layout(config["layout"]), len(config["preprocessing"]["image_mean"])
    preprocessing = _preprocessing(config["preprocessing"])
    generator, library_size = _generator(config["generator"], channels)
    prompts = layout.num_virtual_tokens
    patch = (channels, layout.patch_size, layout.patch_size)
    with torch.device("meta"):
        if generator is None:
            library = torch.empty(prompts, *patch)
        elif config["library_per_slot"]:
            library = torch.empty(prompts, library_size, *patch)
        else:
            library = torch.empty(library_size, *patch)
        exact = not config["in_range"]
        offsets = torch.empty(prompts, *patch) if exact else None
        size = layout.image_size if exact else patch[1:]
        image_offset = torch.empty(channels, *size) if config["image_offset"] else None
        head = None
        if config["head"] is not None:
            labels, width = check_pair("head", config["head"], 1_000_000)
            head = nn.Linear(width, labels)
        server_labels = _labels(config["server_labels"])
        probe_scores = torch.empty(len(server_labels)) if config["probe"] else None
    id2label, label_mapping = _labels(config["id2label"]), config["label_mapping"]
    if label_mapping is not None:
        label_mapping = check_indices("label_mapping", label_mapping)
        if len(label_mapping) != len(id2label) or max(label_mapping) >= len(server_labels):
            raise ValueError(
                f"`label_mapping` must map the {len(id2label)} classes to the server's {len(server_labels)}, but got "
                f"{label_mapping}. Save or fetch the prompter again."
            )
    return cls(
        layout,
        preprocessing,
        PixelPrompts(library, offsets, image_offset),
        generator,
        id2label=id2label,
        label_mapping=label_mapping,
        server_labels=server_labels,
        head=head,
        probe_scores=probe_scores,
    )


def _labels(labels: dict[str, str] | None) -> dict[int, str] | None:
    return None if labels is None else normalize_id2label(labels)


def _layout(settings: dict[str, Any]) -> PromptLayout:
    check_choice("prompt_layout", settings["name"], LAYOUTS)
    image_size = check_pair("image_size", settings["image_size"], LARGEST_SIDE)
    patch_size = check_integer("patch_size", settings["patch_size"], 1, LARGEST_SIDE)
    prompts = check_integer("num_virtual_tokens", settings["num_virtual_tokens"], 1, LARGEST_LIBRARY)
    return make_layout(settings["name"], image_size, patch_size, prompts)


def _preprocessing(settings: dict[str, Any]) -> Preprocessing:
    def size(name: str) -> tuple[int, int] | None:
        return None if settings[name] is None else check_pair(name, settings[name], LARGEST_SIDE)

    check_choice("resample", settings["resample"], tuple(RESAMPLING.values()))
    return Preprocessing(
        image_mean=tuple(check_channel_values("image_mean", settings["image_mean"], positive=False)),
        image_std=tuple(check_channel_values("image_std", settings["image_std"], positive=True)),
        size=size("size"),
        shortest_edge=check_integer("shortest_edge", settings["shortest_edge"], 1, LARGEST_SIDE, optional=True),
        resample=settings["resample"],
        crop_size=size("crop_size"),
    )


def _generator(settings: dict[str, Any] | None, channels: int) -> tuple[PromptGenerator | None, int]:
    if settings is None:
        return None, 0
    check_choice("trunk", settings["trunk"], tuple(TRUNKS))
    check_choice("norm", settings["norm"], tuple(NORMS))
    check_choice("mixing", settings["mixing"], tuple(MIXINGS))
    library_size = check_integer("library_size", settings["library_size"], 1, LARGEST_LIBRARY)
    with torch.device("meta"):
        generator = PromptGenerator(
            check_integer("num_virtual_tokens", settings["num_virtual_tokens"], 1, LARGEST_LIBRARY),
            library_size,
            trunk=settings["trunk"],
            num_channels=channels,
            image_size=check_integer("image_size", settings["image_size"], 8, LARGEST_SIDE, optional=True),
            width=check_integer("width", settings["width"], 4, LARGEST_WIDTH),
            norm=settings["norm"],
            mixing=settings["mixing"],
            rank=check_integer("rank", settings["rank"], 1, LARGEST_WIDTH, optional=True),
        )
    return generator, library_size


def find(name_or_path: str | Path, revision: str | None, token: str | None) -> Path:
    """Return the folder of a prompter: a local one, or a download of the Hub's.

    Raises:
        OSError: there is none.
    """
    folder = Path(name_or_path)
    if is_folder(folder):
        finish_save(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not folder.joinpath(name).is_file():
                raise OSError(
                    f"`{folder}` must be the folder of a prompter, but got one without {name}. Save it there with "
                    "save_pretrained; an adapter's folder is turned into one with ImagePrompter.from_adapter."
                )
        return folder
    problem = f"`{name_or_path}` must be an existing folder, or the id of a prompter on the Hub"
    hub = _import_hub(problem)
    try:
        files = [
            hub.hf_hub_download(str(name_or_path), name, revision=revision, token=token)
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
    except (OSError, ValueError) as error:  # not there, or no possible id
        raise OSError(f"{problem}, but got neither: {error} Look for a misspelt path.") from error
    return Path(files[0]).parent


def push(prompter: ImagePrompter, repo_id: str, private: bool | None, token: str | None) -> str:
    """Create the repository where it does not exist, and upload both files and a card in one commit."""
    hub = _import_hub(f"`repo_id` must be reached over the network, but got {repo_id!r}")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(prompter, Path(folder))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        make_prompter_card(prompter, repo_id).save(Path(folder, "README.md"))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload prompter")
    return repo_id


def _import_hub(problem: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(f"{problem}; for the latter `pip install huggingface_hub`.") from error
    return huggingface_hub
