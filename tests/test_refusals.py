"""Models, names, images and methods that do not fit are refused by name, and nothing is changed."""

import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
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
    ViTConfig,
    ViTForMaskedImageModeling,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def model():
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(id2label={0: "cat", 1: "dog"}))).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Dinov2Backbone(Dinov2Config(**SMALL)), "feature maps of its layers"),
        (lambda: BeitForMaskedImageModeling(BeitConfig(**SMALL)), "rebuilds the image"),
        (lambda: Aimv2Model(Aimv2Config(vision_config=SMALL, text_config=SMALL)), "a tower for texts too"),
        (lambda: ViTForMaskedImageModeling(ViTConfig(**SMALL)), "rebuilds the image"),
        (lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)), "two heads"),
        (lambda: ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1])), "no sequence"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "name the module that makes its tokens"),
    ],
)
def test_other_architectures_are_refused_by_name(make, reason):
    model = make()
    before = str(model)
    with pytest.raises(
        TypeError, match=f"`model` must be one of ViTForImage.*but got a {type(model).__name__}.*{reason}"
    ):
        get_peft_model(model, tiny_config())
    assert str(model) == before


def test_a_refused_architecture_stays_refused_when_its_embeddings_are_named():
    with pytest.raises(TypeError, match="feature maps of its layers"):
        get_peft_model(Dinov2Backbone(Dinov2Config(**SMALL)), tiny_config(target_modules="embeddings"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("vit.encoder", r"`target_modules` must be \['vit.embeddings'\] for a ViTForImageClassification, but got"),
        ("ddings", r"`target_modules` must be \['vit.embeddings'\] for a ViTForImageClassification, but got"),
    ],
)
def test_another_target_in_a_supported_architecture_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_vit(), tiny_config(target_modules=target))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "must name one module of the model, but got 'nowhere', which is the name of no module"),
        ("attention", "must name one module of the model, but got 'attention', which is the name of 2 modules"),
        ("0.layernorm", "must name the embeddings of a ViT.*but got '0.layernorm', a LayerNorm"),
    ],
)
def test_a_target_that_makes_no_tokens_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(tiny_vit("ViTModel")), tiny_config(target_modules=target))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("classifier", "not name the classification head"),
        ("sifier", "not name the classification head"),
        ("embeddings", "not name the embeddings"),
        ("vit", "not name the embeddings"),
        ("vit.embeddings.patch_embeddings", "not name the embeddings"),
        ("projection", "not name the embeddings"),
        ("fc_norm", "name modules of the model"),
    ],
)
def test_modules_to_save_may_not_take_what_pgn_wraps_or_nothing(name, reason):
    base = tiny_vit()
    before = str(base)
    with pytest.raises(ValueError, match=f"`modules_to_save` must {reason}.*{name}"):
        get_peft_model(base, tiny_config(modules_to_save=[name]))
    assert str(base) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.b",
        "trunk",
        "head",
        "layers",
        "0",
        "vit",
        "tokens",
        "model",
        "pgn_head",
        "pgn_library",
        "train",
        "pop",
        "__base__",
    ],
)
def test_adapter_names_that_peft_would_confuse_are_refused(name, model, pixel_values):
    expected = answer(model, pixel_values)
    with pytest.raises(ValueError, match=f"`adapter_name` must be a word.*but got {name!r}"):
        model.add_adapter(name, tiny_config())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[0], ValueError, r"four axes \(B, C, H, W\), but got shape \(3, 32, 32\).*pixel_values\[None\]"),
        (lambda x: (x * 50).to(torch.uint8), TypeError, "floating-point images, but got torch.uint8.*processor"),
        (lambda x: (x * 50).long(), TypeError, "floating-point images, but got torch.int64"),
        (lambda x: x[:, :1], ValueError, r"3 channels, as the backbone does, but got 1 in shape .*convert\('RGB'\)"),
        (lambda x: x[:, :, :24], ValueError, "measure 32 x 32 pixels.*but got 24 x 32.*interpolate_pos_encoding=True"),
        (lambda x: x.numpy(), TypeError, "be a tensor .*but got ndarray"),
        (lambda x: None, TypeError, "be a tensor .*but got NoneType"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_wrong_images_are_refused(change, error, message, by_name, model, pixel_values):
    bad = change(pixel_values)
    with pytest.raises(error, match="`pixel_values` must .*" + message):
        model(pixel_values=bad) if by_name else model(bad)


def test_another_method_on_the_same_model_is_refused(model, pixel_values):
    expected = answer(model, pixel_values)
    lora = LoraConfig(target_modules=["q_proj"])
    message = "cannot take an adapter of another method, but got LoraConfig"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, lora)
    with pytest.raises(ValueError, match="different peft types"):  # PEFT's own words
        model.add_adapter("lora", lora)
    plain = tiny_vit()
    inject_adapter_in_model(tiny_config(), plain, adapter_name="pgn")
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="Already found"):
        inject_adapter_in_model(lora, plain, adapter_name="lora")
    assert torch.equal(answer(model, pixel_values), expected)
    assert list(model.peft_config) == ["default"]


def test_pgn_on_a_model_with_another_method_is_refused(pixel_values):
    wrapped = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])).eval()
    expected = answer(wrapped, pixel_values)
    with pytest.raises(ValueError, match=r"must be a plain model, but got a PeftModel.*unload\(\)"):
        get_peft_model(wrapped, tiny_config())
    with pytest.raises(ValueError, match=r"must carry no adapters of another method, but got peft.tuners.lora"):
        inject_adapter_in_model(tiny_config(), wrapped.get_base_model())
    assert isinstance(wrapped.peft_config["default"], LoraConfig)
    assert torch.equal(answer(wrapped, pixel_values), expected)


def test_peft_mixed_model_is_refused():
    with pytest.raises(ValueError, match="'PGN' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_vit(), tiny_config(), mixed=True)


def test_a_one_channel_backbone_asks_for_grey_images():
    model = get_peft_model(tiny_vit(num_channels=1), tiny_config())
    with pytest.raises(ValueError, match=r"must have 1 channels.*image.convert\('L'\)"):
        model(torch.zeros(1, 3, 32, 32))


def test_a_head_of_another_size_than_the_models_labels_is_refused():
    base = tiny_vit()
    base.config.id2label = {0: "a", 1: "b"}
    before = str(base)
    with pytest.raises(ValueError, match="`id2label` in the model's config must name 5 classes, the size of its head"):
        get_peft_model(base, tiny_config())
    assert str(base) == before
