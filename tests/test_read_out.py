"""Backbones that read more than token 0: prompts act in the layers, and are not there when tokens are averaged."""

import pytest
import torch
from conftest import (
    PIXEL,
    answer,
    assert_same,
    embeddings_of,
    layers_of,
    move_adapter,
    refused,
    tiny_config,
    tiny_vit,
    widen_biases,
)
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from pgn_peft import Classifier, load_classifier, make_prompter
from pgn_peft.tuner.adapters import prompt_layer

AVERAGING = [
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2Model",
    "IJepaForImageClassification",
    "CLIPForImageClassification",
    "SiglipForImageClassification",
    "SiglipVisionModel",
    "DINOv3ViTModel",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "Aimv2VisionModel",
    "TimmWrapperForImageClassification",
]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def adapt(base, **overrides):
    return move_adapter(get_peft_model(base, tiny_config(**overrides))).eval()


def frozen_head(architecture):
    return {"head": "frozen"} if architecture.endswith("Classification") else {}


def answer_beside(base, prompts, pixel_values):
    """What a plain model answers if others join its tokens before the first layer and leave them behind the last.

    DINOv3 takes the tokens before the patches for those without a position, so there they join in the middle.
    """
    count = prompts.shape[1]
    before = 1 + base.config.num_register_tokens if type(base).__name__.startswith("DINOv3") else None

    def join(module, inputs, output):
        tokens, *others = output if isinstance(output, tuple) else (output,)
        at = tokens.shape[1] if before is None else before
        tokens = torch.cat([tokens[:, :at], prompts, tokens[:, at:]], dim=1)
        return (tokens, *others) if others else tokens

    def leave(module, inputs, output):
        tokens, *others = output if isinstance(output, tuple) else (output,)
        at = tokens.shape[1] - count if before is None else before
        tokens = torch.cat([tokens[:, :at], tokens[:, at + count :]], dim=1)
        return (tokens, *others) if isinstance(output, tuple) else tokens

    timm_model = getattr(base, "timm_model", None)
    (embeddings_of(base) if timm_model is None else timm_model.patch_drop).register_forward_hook(join)
    layers_of(base)[-1].register_forward_hook(leave)
    widen_biases(base, count)
    return answer(base, pixel_values)


@pytest.mark.parametrize("architecture", AVERAGING)
def test_the_images_own_tokens_are_what_is_read(architecture, pixel_values):
    base = tiny_vit(architecture)
    plain = answer(base, pixel_values)
    model = adapt(tiny_vit(architecture), **frozen_head(architecture))
    prompts = prompt_layer(model).prompts("default", pixel_values)
    answered = answer(model, pixel_values)
    assert answered.shape == plain.shape
    assert_same(answered, answer_beside(base, prompts, pixel_values))
    assert (answered - plain).abs().max() > 1e-3


def test_prompts_of_several_adapters_end_together(pixel_values):
    model = adapt(tiny_vit("Dinov2Model"))
    model.add_adapter("more", tiny_config(num_virtual_tokens=2))
    move_adapter(model, seed=3).eval()
    model.base_model.set_adapter(["default", "more"])
    layer = prompt_layer(model)
    prompts = torch.cat([layer.prompts(name, pixel_values) for name in ("default", "more")], dim=1)
    assert_same(answer(model, pixel_values), answer_beside(tiny_vit("Dinov2Model"), prompts, pixel_values))


@pytest.mark.parametrize("architecture", ["Dinov2ForImageClassification", "SiglipForImageClassification"])
def test_the_adapters_head_is_as_wide_as_the_models(architecture, pixel_values):
    model = adapt(tiny_vit(architecture), id2label={0: "cat", 1: "dog", 2: "owl"})
    assert answer(model, pixel_values).shape == (4, 3)
    if architecture.startswith("Dinov2"):
        headless = adapt(tiny_vit(architecture, num_labels=0), num_labels=3)
        assert isinstance(headless.get_base_model().classifier.base_layer, nn.Identity)
        assert answer(headless, pixel_values).shape == (4, 3)


@pytest.mark.parametrize(
    "architecture",
    [
        "Dinov2WithRegistersForImageClassification",
        "SiglipForImageClassification",
        "DINOv3ViTModel",
        "BeitForImageClassification",
        "TimmWrapperForImageClassification",
    ],
)
def test_prompts_in_pixel_space_work_with_every_read_out(architecture, pixel_values):
    model = adapt(tiny_vit(architecture), **PIXEL, **frozen_head(architecture))
    prompted = prompt_layer(model).prompted_images("default", pixel_values)
    assert_same(answer(model, pixel_values), answer(tiny_vit(architecture), prompted), valid_pixels=True)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    served = answer(tiny_vit(architecture), make_prompter(model, PROCESSOR).pixel_values([image]))
    expected = answer(model, PROCESSOR(image, return_tensors="pt")["pixel_values"])
    assert_same(served, expected, valid_pixels=True)


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_latent_prompts_become_pixels_where_token_0_is_read(architecture, pixel_values):
    # Width 16 for patches of 192 numbers, and a whole row of prompts.
    narrow = {"hidden_size": 16, "num_attention_heads": 1}
    model = adapt(tiny_vit(architecture, **narrow), num_virtual_tokens=4, head="frozen")
    prompter = make_prompter(model, PROCESSOR)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latent = answer(model, PROCESSOR(image, return_tensors="pt")["pixel_values"])
    served = answer(tiny_vit(architecture, **narrow), prompter.pixel_values([image]), interpolate_pos_encoding=True)
    assert_same(served, latent, tolerance=1e-3)


def test_latent_prompts_cannot_become_pixels_where_tokens_are_averaged():
    with refused(ValueError, "prompt_layout"):
        get_peft_model(
            tiny_vit("Dinov2ForImageClassification"), tiny_config(prompt_layout="append", num_virtual_tokens=4)
        )
    model = adapt(tiny_vit("Dinov2ForImageClassification"), num_virtual_tokens=4)
    with refused(ValueError, "pixel"):
        make_prompter(model, PROCESSOR)


def test_a_pipeline_takes_another_size_than_the_checkpoints(tmp_path):
    tiny_vit("Dinov2ForImageClassification").save_pretrained(tmp_path / "base")
    base = tiny_vit("Dinov2ForImageClassification").from_pretrained(tmp_path / "base")
    model = adapt(base, id2label={0: "cat", 1: "dog"})
    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    Classifier(model, processor).save_pretrained(tmp_path / "adapter")
    assert "interpolate_pos_encoding" not in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    image = Image.new("RGB", (40, 30), "red")
    answers = load_classifier(tmp_path / "adapter").pipeline()(image)
    expected = answer(model, processor(image, return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    scores = {"cat": expected[0].item(), "dog": expected[1].item()}
    assert_same({each["label"]: each["score"] for each in answers}, scores)
