"""Networks that were released with the paper: loading them, and converting them to adapters.

A released file is the state dict of a prompt generator. It contains neither the backbone nor a classification head.
"""

from __future__ import annotations

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
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.files import compare_tensors

LIBRARY = "tl_vectors"
STEM_WEIGHT, HEAD_WEIGHT = "model.input_net.0.weight", "model.output_net.2.weight"
# Our module -> the official one.
IN_BLOCKS = {"conv1": "net.0", "norm1": "net.1", "conv2": "net.3", "norm2": "net.4", "shortcut": "downsample"}
MODULES = {
    "trunk.stem_conv": "model.input_net.0",
    "trunk.stem_norm": "model.input_net.1",
    "head": "model.output_net.2",
} | {
    f"trunk.block{block + 1}.{ours}": f"model.blocks.{block}.{official}"
    for block in range(4)
    for ours, official in IN_BLOCKS.items()
}
REMEDY = "Give a .pt file of the official release, the state dict of a PGN with the resnet10 generator."


@dataclass(frozen=True)
class OfficialNetwork:
    """A released network, in eval mode.

    Args:
        generator: images to coefficients (B, P, L).
        library: coefficients to prompts (B, P, D).
    """

    generator: PromptGenerator
    library: TokenLibrary

    @torch.no_grad()
    def prompts(self, pixel_values: Tensor) -> Tensor:
        """Compute prompts (B, P, D) of images (B, C, H, W), normalised as for the backbone; 224 px in the release."""
        return self.library(self.generator(pixel_values))

    def config(self, **fields: Any) -> PGNConfig:
        """Return the config of an adapter of this shape, with further fields, such as `id2label`."""
        settings = self.generator.settings
        return PGNConfig(
            num_virtual_tokens=settings["num_virtual_tokens"],
            library_size=settings["library_size"],
            generator=settings["trunk"],
            generator_image_size=settings["image_size"],
            generator_width=settings["width"],
            generator_norm=settings["norm"],
            prompt_depth=1,
            static_prompts=False,
            mixing_init_std=0.0,
            **fields,
        )


def load(path: str | Path) -> OfficialNetwork:
    """Load a released network. Its sizes follow from the tensors in the file.

    Args:
        path: the .pt file. Only tensors are read; no code in it is run.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is not a released network.

    Source: the official code and checkpoints of arXiv:2210.06466 (MIT). The code can also mix by a sigmoid, resize the
    generator's images, or omit the pooling after the stem. None of these changes a tensor, and the released networks
    use none of them.
    """
    tensors = _read(Path(path))
    shapes = [tuple(tensors[name].shape) if name in tensors else () for name in (LIBRARY, STEM_WEIGHT, HEAD_WEIGHT)]
    if [len(shape) for shape in shapes] != [2, 4, 2] or 0 in sum(shapes, ()) or shapes[2][0] % shapes[0][0]:
        raise ValueError(
            f"{str(path)!r} is not a released network: {LIBRARY}, {STEM_WEIGHT} and {HEAD_WEIGHT} have the shapes "
            f"{shapes}, but must be a library (L, D), a convolution, and L logits for each prompt. {REMEDY}"
        )
    (library_size, hidden_size), (width, num_channels, *_), (num_logits, _) = shapes
    with torch.device("meta"):  # no memory is allocated before the file's tensors have been checked
        generator = PromptGenerator(num_logits // library_size, library_size, num_channels=num_channels, width=width)
        library = TokenLibrary(library_size, hidden_size)
    expected = {LIBRARY: library.tokens} | {_official(name): value for name, value in generator.state_dict().items()}
    compare_tensors(expected, tensors, str(path), REMEDY)
    generator.load_state_dict(
        {name: tensors[_official(name)].to(value.dtype) for name, value in generator.state_dict().items()}, assign=True
    )
    library.load_state_dict({"tokens": tensors[LIBRARY].float()}, assign=True)
    return OfficialNetwork(generator.eval(), library.eval())


def _read(file: Path) -> Mapping[str, Tensor]:
    size = file.stat().st_size
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    except Exception as error:  # of many types; for other objects, torch's own message advises to run their code
        raise ValueError(f"{str(file)!r} is damaged, or holds something else than tensors. {REMEDY}") from error
    if sum(sizes) > size:  # with strides of 0 a small file can describe huge tensors
        raise ValueError(f"{str(file)!r} describes tensors that are larger than the file. {REMEDY}")
    # Counters of batches are not used, and not part of our own files.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _official(name: str) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{MODULES[module]}.{tensor}"


def state_dict(network: OfficialNetwork) -> dict[str, Tensor]:
    """Return a network's tensors under their official names, as `load` reads them."""
    tensors = {_official(name): tensor for name, tensor in network.generator.state_dict().items()}
    return {LIBRARY: network.library.tokens.detach()} | tensors


def adapt(model: nn.Module, network: OfficialNetwork, adapter_name: str = "default", **fields: Any) -> PeftModel:
    """Add a released network to a model as an adapter. Its head is new, because released files have none.

    Args:
        model: the backbone that the network was trained for. The file does not name it, and prompts for CLIP's
            ViT-B/32 do not work on torchvision's, which has the same width.
        network: from `load`.
        adapter_name: the adapter.
        fields: further fields of `PGNConfig`, such as `id2label`.

    Returns:
        The model with the adapter, ready to train the head or to `save_pretrained`.

    Raises:
        TypeError: the model is not supported.
        ValueError: a field does not fit the model.
        RuntimeError: the model has another width.
    """
    adapted = get_peft_model(model, network.config(**fields), adapter_name=adapter_name)
    layer = prompt_layer(adapted)
    layer.pgn_generator[adapter_name].load_state_dict(network.generator.state_dict())
    layer.pgn_library[adapter_name].load_state_dict(network.library.state_dict())
    return adapted
