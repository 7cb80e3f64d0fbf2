"""The networks that were released with the paper, as generator and library, and as an adapter.

A released file is the state dict of a prompt generator: neither the backbone nor a classification head is in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.backbones import find_backbone
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import patch_projection
from pgn_peft.utils.files import compare_tensors

LIBRARY = "tl_vectors"
STEM, HEAD = "model.input_net.0", "model.output_net.2"
# Our module -> the official one.
MODULES = {"trunk.stem_conv": STEM, "trunk.stem_norm": "model.input_net.1", "head": HEAD} | {
    f"trunk.block{block + 1}.{ours}": f"model.blocks.{block}.{official}"
    for block in range(4)
    for ours, official in {
        "conv1": "net.0",
        "norm1": "net.1",
        "conv2": "net.3",
        "norm2": "net.4",
        "shortcut": "downsample",
    }.items()
}
REMEDY = "Give a .pt file of the official release: the state dict of a PGN with the resnet10 generator."


@dataclass(frozen=True)
class OfficialNetwork:
    """A released network, in eval mode.

    Args:
        generator: images to coefficients (B, P, L).
        library: coefficients to prompts (B, P, D).
    """

    generator: PromptGenerator
    library: TokenLibrary

    @property
    def hidden_size(self) -> int:
        """The width D of the backbone that it was trained for."""
        return self.library.tokens.shape[1]

    @torch.no_grad()
    def prompts(self, pixel_values: Tensor) -> Tensor:
        """Make the prompts (B, P, D) of images (B, C, H, W), normalised as for the backbone; 224 px in the release."""
        return self.library(self.generator(pixel_values))

    def config(self, **fields: Any) -> PGNConfig:
        """Return the config of an adapter of this shape.

        Args:
            fields: of `PGNConfig` that the file does not contain, such as `id2label`.
        """
        settings = self.generator.settings
        return PGNConfig(
            num_virtual_tokens=settings["num_virtual_tokens"],
            library_size=settings["library_size"],
            generator=settings["trunk"],
            generator_image_size=settings["image_size"],
            generator_width=settings["width"],
            generator_norm=settings["norm"],
            mixing=settings["mixing"],
            static_prompts=False,
            mixing_init_std=0.0,
            **fields,
        )


def load(path: str | Path, mixing: str = "softmax", generator_image_size: int | None = None) -> OfficialNetwork:
    """Read a released network; its sizes follow from the tensors in the file.

    Args:
        path: the .pt file. It is read as tensors only: no code in it is run.
        mixing: "softmax", as released, or "sigmoid"; the file does not say.
        generator_image_size: side to which the generator resizes images; None, as released: it does not. The file does
            not say that either.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is not a released network.

    Source: the official code and checkpoints of arXiv:2210.06466 (MIT). The code can leave out the pooling after
    the stem, which changes no tensor; the released networks have it.
    """
    file = Path(path)
    tensors = _read(file)
    library_size, hidden_size = _shape(tensors, LIBRARY, 2, file)
    width, num_channels, _, _ = _shape(tensors, STEM + ".weight", 4, file)
    num_logits, _ = _shape(tensors, HEAD + ".weight", 2, file)
    if 0 in (library_size, hidden_size, width, num_channels, num_logits) or num_logits % library_size:
        raise ValueError(
            f"`{file}` must have {library_size} logits for each prompt, one for each library token, but got "
            f"{num_logits} in {HEAD}. {REMEDY}"
        )
    with torch.device("meta"):  # until the file's tensors have been compared with these sizes
        generator = PromptGenerator(
            num_logits // library_size,
            library_size,
            num_channels=num_channels,
            width=width,
            mixing=mixing,
            image_size=generator_image_size,
        )
        library = TokenLibrary(library_size, hidden_size)
    expected = {LIBRARY: library.tokens} | {_official(name): value for name, value in generator.state_dict().items()}
    compare_tensors(expected, tensors, str(file), REMEDY)
    generator.load_state_dict(
        {name: tensors[_official(name)].to(value.dtype) for name, value in generator.state_dict().items()}, assign=True
    )
    library.load_state_dict({"tokens": tensors[LIBRARY].float()}, assign=True)
    return OfficialNetwork(generator.eval(), library.eval())


def _official(name: str) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{MODULES[module]}.{tensor}"


def state_dict(network: OfficialNetwork) -> dict[str, Tensor]:
    """Return a network's tensors under their official names: what `load` reads, written back."""
    tensors = {_official(name): tensor for name, tensor in network.generator.state_dict().items()}
    return {LIBRARY: network.library.tokens.detach()} | tensors


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.is_dir():
        raise ValueError(f"`{file}` must be a file, but got a directory. {REMEDY}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message advises to read it with code execution.
        raise ValueError(
            f"`{file}` must hold tensors only, but got other objects, or no torch file. {REMEDY}"
        ) from error
    except Exception as error:  # torch reports a damaged file in many ways
        raise ValueError(
            f"`{file}` must be a complete torch file, but reading it failed: {error}. {REMEDY}"
        ) from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(value, Tensor) and value.layout is torch.strided for value in tensors.values()
    ):
        raise ValueError(f"`{file}` must hold dense tensors by name, but got a {type(tensors).__name__}. {REMEDY}")
    # With strides of 0 a small file can describe a huge tensor.
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    if size > file.stat().st_size:
        raise ValueError(
            f"`{file}` must hold all numbers of its tensors, {size:,} bytes, but got {file.stat().st_size:,}. {REMEDY}"
        )
    return tensors


def _shape(tensors: Mapping[str, Tensor], name: str, axes: int, file: Path) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != axes:
        found = (
            f"{tuple(tensors[name].shape)} there" if name in tensors else f"{', '.join(list(tensors)[:3]) or 'none'}"
        )
        raise ValueError(f"`{file}` must hold {name} with {axes} axes, but got {found}. {REMEDY}")
    return tuple(tensors[name].shape)


def adapt(model: nn.Module, network: OfficialNetwork, adapter_name: str = "default", **fields: Any) -> PeftModel:
    """Make a released network an adapter of a model. The head is new: no released file has one.

    Args:
        model: the backbone that the network was trained for. The file does not say which: CLIP's and torchvision's
            ViT-B/32 have the same width, but not the same prompts.
        network: from `load`.
        adapter_name: the adapter's.
        fields: of `PGNConfig` that the file does not contain, such as `id2label`.

    Returns:
        The model with the adapter, ready to train the head or to `save_pretrained`.

    Raises:
        TypeError: the model is not supported.
        ValueError: the model has another width, or a field does not fit it.
    """
    width = patch_projection(model.get_submodule(find_backbone(model).embeddings)).out_channels
    if width != network.hidden_size:
        raise ValueError(
            f"`model` must have the width {network.hidden_size} of the network's library, but got {width} in a "
            f"{type(model).__name__}. Load the backbone that the network was trained for."
        )
    adapted = get_peft_model(model, network.config(**fields), adapter_name=adapter_name)
    layer = prompt_layer(adapted)
    layer.pgn_generator[adapter_name].load_state_dict(network.generator.state_dict())
    layer.pgn_library[adapter_name].load_state_dict(network.library.state_dict())
    return adapted
