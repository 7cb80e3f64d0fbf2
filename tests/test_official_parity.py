"""Our generator and library compute what the official code computes.

The reference prompts were computed with the official code from three of its released checkpoints.
"""

import pytest
import torch
from safetensors.torch import load_file

from pgn_peft.generator import PromptGenerator
from pgn_peft.library import TokenLibrary

pytestmark = pytest.mark.shared

OURS = {"net.0": "conv1", "net.1": "norm1", "net.3": "conv2", "net.4": "norm2", "downsample": "shortcut"}


def rename(name):
    """Official parameter name -> ours."""
    name = name.removeprefix("model.")
    for official, ours in {
        "input_net.0": "trunk.stem_conv",
        "input_net.1": "trunk.stem_norm",
        "output_net.2": "head",
    }.items():
        if name.startswith(official):
            return name.replace(official, ours)
    _, index, rest = name.split(".", 2)
    part = next(part for part in OURS if rest.startswith(part))
    return f"trunk.block{int(index) + 1}.{OURS[part]}{rest.removeprefix(part)}"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("pgn_clip_svhn", 1_032_304), ("pgn_vit_eurosat", 669_808), ("pgn_dino_eurosat", 620_656)],
)
def test_released_checkpoint_gives_the_reference_prompts(shared, name, parameters):
    official = torch.load(shared / "official_pgn" / f"{name}.pt", weights_only=True)
    reference = load_file(shared / "official_pgn" / "reference_prompts.safetensors")
    tokens = official.pop("tl_vectors")
    generator = PromptGenerator(num_virtual_tokens=16, library_size=len(tokens)).eval()
    generator.load_state_dict({rename(key): value for key, value in official.items()})
    library = TokenLibrary(*tokens.shape)
    library.load_state_dict({"tokens": tokens})

    with torch.no_grad():
        prompts = library(generator(reference["pixel_values"]))

    assert (prompts - reference[name]).abs().max() <= 1e-5
    assert sum(p.numel() for module in (generator, library) for p in module.parameters()) == parameters
