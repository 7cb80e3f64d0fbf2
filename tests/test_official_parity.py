"""Released networks give here what they give in the official code.

The reference prompts were computed with the official code from three of its released checkpoints.
"""

import pytest
import torch
from conftest import answer
from peft import AutoPeftModel
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTForImageClassification

from pgn_peft import official
from pgn_peft.tuner.adapters import prompt_layer

pytestmark = pytest.mark.shared

# name -> parameters, library size, width
RELEASED = {
    "pgn_clip_svhn": (1_032_304, 256, 768),
    "pgn_vit_eurosat": (669_808, 128, 768),
    "pgn_dino_eurosat": (620_656, 128, 384),
}


@pytest.fixture(params=RELEASED)
def released(request, shared):
    """A released file's name, path, images and prompts."""
    folder = shared / "official_pgn"
    reference = load_file(folder / "reference_prompts.safetensors")
    return request.param, folder / f"{request.param}.pt", reference["pixel_values"], reference[request.param]


def test_released_checkpoint_gives_the_reference_prompts(released):
    name, file, pixel_values, expected = released
    network = official.load(file)
    assert (network.prompts(pixel_values) - expected).abs().max() <= 1e-5
    parts = (network.generator, network.library)
    assert sum(p.numel() for part in parts for p in part.parameters()) == RELEASED[name][0]
    assert tuple(network.library.tokens.shape) == RELEASED[name][1:]
    assert network.generator.num_virtual_tokens == 16
    assert not any(module.training for part in parts for module in part.modules())


def test_a_released_checkpoint_becomes_an_adapter_that_makes_the_same_prompts(released, tmp_path):
    name, file, pixel_values, expected = released
    network = official.load(file)
    width = network.library.tokens.shape[1]
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 64}
    torch.manual_seed(0)
    if name == "pgn_clip_svhn":  # its classes are texts, which the tower's projection is compared with
        base = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32, projection_dim=10, **sizes)).eval()
        labels = {}
    else:
        base = ViTForImageClassification(ViTConfig(patch_size=32, num_labels=7, **sizes)).eval()
        labels = {"num_labels": 10}
    base.save_pretrained(tmp_path / "base")
    model = official.adapt(type(base).from_pretrained(tmp_path / "base"), network, **labels)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert (prompt_layer(loaded).prompts("default", pixel_values) - expected).abs().max() <= 1e-5
    assert answer(loaded, pixel_values).shape == (4, 10)
    if not labels:
        assert (answer(loaded, pixel_values) - answer(base, pixel_values)).abs().max() > 1e-3
