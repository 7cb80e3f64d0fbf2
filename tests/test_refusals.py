"""Models, names, images and methods that do not fit are refused by name, and nothing is changed."""

import pytest
import torch
from conftest import answer, move_adapter, refused, tiny_config, tiny_vit
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    Aimv2Config,
    Aimv2Model,
    BeitConfig,
    BeitForMaskedImageModeling,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Backbone,
    Dinov2Config,
    ResNetConfig,
    ResNetForImageClassification,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def model():
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(id2label={0: "cat", 1: "dog"}))).eval()


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: Dinov2Backbone(Dinov2Config(**SMALL)), {}),
        (lambda: Dinov2Backbone(Dinov2Config(**SMALL)), {"target_modules": "embeddings"}),
        (lambda: BeitForMaskedImageModeling(BeitConfig(**SMALL)), {}),
        (lambda: Aimv2Model(Aimv2Config(vision_config=SMALL, text_config=SMALL)), {}),
        (lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)), {}),
        (lambda: ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1])), {}),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}),
    ],
)
def test_other_architectures_are_refused_by_name(make, fields):
    model = make()
    before = str(model)
    with refused(TypeError, type(model).__name__):
        get_peft_model(model, tiny_config(**fields))
    assert str(model) == before


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (tiny_vit, "vit.encoder"),
        (lambda: nn.Sequential(tiny_vit("ViTModel")), "nowhere"),
        (lambda: nn.Sequential(tiny_vit("ViTModel")), "attention"),  # two modules
        (lambda: nn.Sequential(tiny_vit("ViTModel")), "0.layernorm"),  # makes no tokens
    ],
)
def test_a_target_that_makes_no_tokens_is_refused(make, target):
    with refused(ValueError, target):
        get_peft_model(make(), tiny_config(target_modules=target))


@pytest.mark.parametrize("name", ["vit", "vit.embeddings.patch_embeddings", "fc_norm"])
def test_modules_to_save_may_not_take_what_pgn_wraps_or_nothing(name):
    base = tiny_vit()
    before = str(base)
    with refused(ValueError, "modules_to_save", name):
        get_peft_model(base, tiny_config(modules_to_save=[name]))
    assert str(base) == before


@pytest.mark.parametrize("name", ["", "a.b", "pgn_head", "train", "__base__"])
def test_adapter_names_that_would_be_confused_are_refused(name, model, pixel_values):
    expected = answer(model, pixel_values)
    with refused(ValueError, repr(name)):
        model.add_adapter(name, tiny_config())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (lambda x: x[0], ValueError, "(3, 32, 32)"),
        (lambda x: (x * 50).to(torch.uint8), TypeError, "uint8"),
        (lambda x: x[:, :1], ValueError, "1"),
        (lambda x: x[:, :, :24], ValueError, "interpolate_pos_encoding=True"),
        (lambda x: x.numpy(), TypeError, "ndarray"),
        (lambda x: None, TypeError, "None"),
    ],
)
def test_wrong_images_are_refused(change, error, word, model, pixel_values):
    bad = change(pixel_values)
    with refused(error, "pixel_values", word):
        model(bad)
    with refused(error, "pixel_values", word):
        model(pixel_values=bad)
    with refused(error, "pixel_values", word):
        model(pixel_values=bad, adapter_names=["default"] * 4)


def test_pgn_on_a_model_with_another_method_is_refused(pixel_values):
    wrapped = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])).eval()
    expected = answer(wrapped, pixel_values)
    with refused(ValueError, "add_adapter"):
        get_peft_model(wrapped, tiny_config())
    with refused(ValueError, "another method"):
        inject_adapter_in_model(tiny_config(), wrapped.get_base_model())
    assert isinstance(wrapped.peft_config["default"], LoraConfig)
    assert torch.equal(answer(wrapped, pixel_values), expected)


def test_peft_mixed_model_is_refused():
    with refused(ValueError, "PeftMixedModel"):
        get_peft_model(tiny_vit(), tiny_config(), mixed=True)
