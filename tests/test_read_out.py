"""Backbones that read more than token 0: prompts act in the layers, and are not there when tokens are averaged."""

import pytest
import torch
from conftest import ARCHITECTURES, answer, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from pgn_peft import Classifier, ImagePrompter, load_classifier
from pgn_peft.adapters import prompt_layer

AVERAGING = [name for name in ARCHITECTURES if name.startswith("Dinov2")]
CLASSIFIERS = [name for name in AVERAGING if name.endswith("Classification")]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
SCALE = {"image_mean": PROCESSOR.image_mean, "image_std": PROCESSOR.image_std}


def adapt(base, **overrides):
    return move_adapter(get_peft_model(base, tiny_config(**overrides))).eval()


def features_by_hand(base, tokens, prompts):
    """What the backbone makes of its tokens beside others that are nowhere read: (B, N, D)."""
    backbone = base.base_model
    sequence = torch.cat([tokens, prompts], dim=1)
    for layer in backbone.encoder.layer:
        sequence = layer(sequence)
    return backbone.layernorm(sequence)[:, : tokens.shape[1]]


@pytest.mark.parametrize("architecture", AVERAGING)
def test_the_images_own_tokens_are_what_is_read(architecture, pixel_values):
    base = tiny_vit(architecture)
    tokens = base.base_model.embeddings(pixel_values)
    model = adapt(tiny_vit(architecture), head="frozen" if architecture in CLASSIFIERS else "trained")
    prompts = prompt_layer(model).prompts("default", pixel_values)
    expected = features_by_hand(base, tokens, prompts).detach()
    if architecture in CLASSIFIERS:
        patches = expected[:, -16:]  # behind CLS and registers
        expected = base.classifier(torch.cat([expected[:, 0], patches.mean(dim=1)], dim=-1)).detach()
    torch.testing.assert_close(answer(model, pixel_values), expected)


def test_prompts_of_several_adapters_end_together(pixel_values):
    model = adapt(tiny_vit("Dinov2Model"))
    model.add_adapter("more", tiny_config(num_virtual_tokens=2))
    move_adapter(model, seed=3).eval()
    model.base_model.set_adapter(["default", "more"])
    layer = prompt_layer(model)
    base = tiny_vit("Dinov2Model")
    prompts = torch.cat([layer.prompts(name, pixel_values) for name in ("default", "more")], dim=1)
    expected = features_by_hand(base, base.embeddings(pixel_values), prompts).detach()
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_the_adapters_head_is_as_wide_as_the_models(architecture, pixel_values):
    model = adapt(tiny_vit(architecture), id2label={0: "cat", 1: "dog", 2: "owl"})
    assert model.peft_config["default"].head_features == 64
    assert answer(model, pixel_values).shape == (4, 3)
    headless = adapt(tiny_vit(architecture, num_labels=0), num_labels=3)
    assert isinstance(headless.get_base_model().classifier.base_layer, nn.Identity)
    assert answer(headless, pixel_values).shape == (4, 3)


@pytest.mark.parametrize("prompt_layout", ["canvas", "append"])
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_prompts_in_pixel_space_are_patches_like_others(architecture, prompt_layout, pixel_values):
    layout = {"prompt_layout": prompt_layout, "num_virtual_tokens": None}
    model = adapt(tiny_vit(architecture), prompt_space="pixel", head="frozen", **SCALE, **layout)
    prompted = prompt_layer(model).prompted_images("default", pixel_values)
    assert torch.equal(answer(model, pixel_values), answer(tiny_vit(architecture), prompted))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompter = ImagePrompter.from_adapter(model, PROCESSOR)
    served = answer(tiny_vit(architecture), prompter.pixel_values([image]))
    torch.testing.assert_close(answer(model, PROCESSOR(image, return_tensors="pt")["pixel_values"]), served)
    assert prompter.probe_scores.shape == (5,)


def test_latent_prompts_cannot_become_pixels_there():
    with pytest.raises(ValueError, match="`prompt_layout` must be None with prompt_space='latent' for a Dinov2ForIm"):
        get_peft_model(
            tiny_vit("Dinov2ForImageClassification"), tiny_config(prompt_layout="append", num_virtual_tokens=4)
        )
    model = adapt(tiny_vit("Dinov2ForImageClassification"), num_virtual_tokens=4)
    with pytest.raises(ValueError, match="`prompt_space` must be 'pixel' for an adapter that is to become.*averages"):
        ImagePrompter.from_adapter(model, PROCESSOR)


@pytest.mark.parametrize("side", [24, 48])
def test_a_pipeline_takes_another_size_than_the_checkpoints(side, tmp_path):
    tiny_vit("Dinov2ForImageClassification").save_pretrained(tmp_path / "base")
    base = tiny_vit("Dinov2ForImageClassification").from_pretrained(tmp_path / "base")
    model = adapt(base, id2label={0: "cat", 1: "dog"})
    processor = ViTImageProcessor(size={"height": side, "width": side})
    Classifier(model, processor).save_pretrained(tmp_path / "adapter")
    assert "interpolate_pos_encoding" not in (tmp_path / "adapter" / "README.md").read_text()
    image = Image.new("RGB", (40, 30), "red")
    answers = load_classifier(tmp_path / "adapter").pipeline()(image)
    expected = answer(model, processor(image, return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    assert {each["label"]: each["score"] for each in answers} == pytest.approx(
        {"cat": expected[0].item(), "dog": expected[1].item()}, abs=1e-5
    )
