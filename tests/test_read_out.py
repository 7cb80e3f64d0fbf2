"""Backbones that read more than token 0: prompts act in the layers, and are not there when tokens are averaged."""

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    REPRESENTATIVES,
    answer,
    assert_same,
    embeddings_of,
    layers_of,
    move_adapter,
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
from pgn_peft.tuner.backbones import SUPPORTED
from pgn_peft.tuner.embeddings import takes_any_size

AVERAGING = [name for name in ARCHITECTURES if SUPPORTED[name].reads_all]
REPRESENTATIVE = [name for name in AVERAGING if name in REPRESENTATIVES]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
SCALE = {"image_mean": PROCESSOR.image_mean, "image_std": PROCESSOR.image_std}


def adapt(base, **overrides):
    return move_adapter(get_peft_model(base, tiny_config(**overrides))).eval()


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
    model = adapt(tiny_vit(architecture), head="frozen" if architecture.endswith("Classification") else "trained")
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


@pytest.mark.parametrize("architecture", REPRESENTATIVE)
def test_the_adapters_head_is_as_wide_as_the_models(architecture, pixel_values):
    model = adapt(tiny_vit(architecture), id2label={0: "cat", 1: "dog", 2: "owl"})
    double = architecture.startswith(("Dinov2", "DINOv3"))
    assert model.peft_config["default"].head_features == (64 if double else None)
    assert answer(model, pixel_values).shape == (4, 3)
    if not architecture.startswith("Dinov2"):
        return  # Transformers fails to make one without a head
    headless = adapt(tiny_vit(architecture, num_labels=0), num_labels=3)
    assert isinstance(headless.get_base_model().classifier.base_layer, nn.Identity)
    assert answer(headless, pixel_values).shape == (4, 3)


@pytest.mark.parametrize("prompt_layout", ["canvas", "append", "dense"])
@pytest.mark.parametrize("architecture", REPRESENTATIVE)
def test_prompts_in_pixel_space_are_patches_like_others(architecture, prompt_layout, pixel_values):
    if prompt_layout == "append" and (SUPPORTED[architecture].positions or SUPPORTED[architecture].carries):
        with pytest.raises(ValueError, match="`prompt_layout` must be 'dense' or 'canvas' for a"):
            adapt(tiny_vit(architecture), prompt_space="pixel", prompt_layout="append", num_virtual_tokens=4, **SCALE)
        return
    layout = {"prompt_layout": prompt_layout, "num_virtual_tokens": None}
    is_classifier = architecture.endswith("Classification")
    head = {"head": "frozen"} if is_classifier else {}
    model = adapt(tiny_vit(architecture), prompt_space="pixel", **head, **SCALE, **layout)
    prompted = prompt_layer(model).prompted_images("default", pixel_values)
    any_size = takes_any_size(embeddings_of(tiny_vit(architecture)))
    larger = {} if any_size else {"interpolate_pos_encoding": prompt_layout == "append"}
    assert_same(answer(model, pixel_values), answer(tiny_vit(architecture), prompted, **larger))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompter = make_prompter(model, PROCESSOR)
    served = answer(tiny_vit(architecture), prompter.pixel_values([image]), **larger)
    torch.testing.assert_close(answer(model, PROCESSOR(image, return_tensors="pt")["pixel_values"]), served)
    assert not is_classifier or prompter.probe_scores.shape == (5,)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in AVERAGING])
def test_latent_prompts_become_pixels_where_token_0_is_read(architecture, pixel_values):
    # Width 16 for patches of 192 numbers, and a whole row of prompts.
    base = tiny_vit(architecture, hidden_size=16, num_attention_heads=1)
    model = adapt(base, num_virtual_tokens=4, **({"head": "frozen"} if hasattr(base, "classifier") else {}))
    prompter = make_prompter(model, PROCESSOR)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latent = answer(model, PROCESSOR(image, return_tensors="pt")["pixel_values"])
    plain = tiny_vit(architecture, hidden_size=16, num_attention_heads=1)
    served = answer(plain, prompter.pixel_values([image]), interpolate_pos_encoding=True)
    if latent.ndim == 3:
        latent, served = latent[:, 0], served[:, 0]
    torch.testing.assert_close(served, latent, rtol=1e-3, atol=1e-3)


def test_latent_prompts_cannot_become_pixels_there():
    with pytest.raises(ValueError, match="`prompt_layout` must be None with prompt_space='latent' for a Dinov2ForIm"):
        get_peft_model(
            tiny_vit("Dinov2ForImageClassification"), tiny_config(prompt_layout="append", num_virtual_tokens=4)
        )
    model = adapt(tiny_vit("Dinov2ForImageClassification"), num_virtual_tokens=4)
    with pytest.raises(ValueError, match="`prompt_space` must be 'pixel' for an adapter that is to become.*averages"):
        make_prompter(model, PROCESSOR)


@pytest.mark.parametrize("side", [24, 48])
def test_a_pipeline_takes_another_size_than_the_checkpoints(side, tmp_path):
    tiny_vit("Dinov2ForImageClassification").save_pretrained(tmp_path / "base")
    base = tiny_vit("Dinov2ForImageClassification").from_pretrained(tmp_path / "base")
    model = adapt(base, id2label={0: "cat", 1: "dog"})
    processor = ViTImageProcessor(size={"height": side, "width": side})
    Classifier(model, processor).save_pretrained(tmp_path / "adapter")
    assert "interpolate_pos_encoding" not in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    image = Image.new("RGB", (40, 30), "red")
    answers = load_classifier(tmp_path / "adapter").pipeline()(image)
    expected = answer(model, processor(image, return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    assert {each["label"]: each["score"] for each in answers} == pytest.approx(
        {"cat": expected[0].item(), "dog": expected[1].item()}, abs=1e-5
    )
