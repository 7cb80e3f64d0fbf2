"""Heads that adapters bring to models without one, and texts, where a model is unusual or is used in another way."""

import copy

import numpy as np
import pytest
import torch
from conftest import answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from test_texts import LABELS, PROCESSOR, adapted, logits_of
from tiny_clip import NAMES, tokenizer, two_towers
from torch import nn
from transformers import (
    Aimv2VisionModel,
    BeitModel,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTImageProcessor,
    ViTModel,
)

from pgn_peft import Classifier, ImagePrompter, embed_texts, load_classifier, make_prompter, use_texts
from pgn_peft.inspection import attention_to_prompts
from pgn_peft.training import head_alone
from pgn_peft.tuner.head import find_head

SCALE = {"image_mean": list(PROCESSOR.image_mean), "image_std": list(PROCESSOR.image_std)}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def linear(architecture="ViTModel", **overrides):
    base = tiny_vit(architecture) if isinstance(architecture, str) else architecture
    return move_adapter(get_peft_model(base, tiny_config(id2label=LABELS, **overrides))).eval()


def without_pool(model_class, architecture, switch):
    config = tiny_vit(architecture).config
    setattr(config, switch, False)
    return model_class(config).eval()


def test_a_model_that_accelerate_has_spread_over_devices_classifies(pixel_values, tmp_path):
    tiny_vit("ViTModel").save_pretrained(tmp_path / "base")
    places = {"embeddings": "cpu", "layers": "disk", "layernorm": "cpu", "pooler": "disk"}
    base = ViTModel.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload").eval()
    before = answer(base, pixel_values)
    model = move_adapter(get_peft_model(base, tiny_config(id2label=LABELS))).eval()
    whole = linear(ViTModel.from_pretrained(tmp_path / "base"))
    assert_same(logits_of(model, pixel_values), logits_of(whole, pixel_values))
    model(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert_same(answer(model.unload(), pixel_values), before)


def test_an_added_head_has_the_models_mode():
    head = find_head(get_peft_model(tiny_vit("ViTModel").eval(), tiny_config(id2label=LABELS)))
    assert not head.training
    assert not head.head("default").training


def test_an_added_head_goes_to_the_models_device():
    model = get_peft_model(two_towers().to("meta"), tiny_config(head="text", id2label=LABELS))
    own = [tensor for name, tensor in model.state_dict().items() if ".pgn_" in name]
    assert {tensor.device.type for tensor in own} == {"meta"}


def test_a_model_in_half_precision_gets_a_head_in_its_precision(pixel_values):
    model = get_peft_model(
        tiny_vit("ViTModel").to(torch.bfloat16), tiny_config(id2label=LABELS), autocast_adapter_dtype=False
    )
    assert find_head(model).head("default").weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_vit("Data2VecVisionModel"),
        lambda: BeitModel(tiny_vit("BeitModel").config, add_pooling_layer=False).eval(),
        lambda: without_pool(SiglipVisionModel, "SiglipVisionModel", "vision_use_head"),
        lambda: without_pool(Aimv2VisionModel, "Aimv2VisionModel", "use_head"),
        lambda: TimmWrapperModel(
            TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM, do_pooling=False)
        ).eval(),
    ],
    ids=["Data2Vec", "BEiT", "SigLIP", "AIMv2", "timm"],
)
def test_models_that_were_made_without_their_pool_classify(make, pixel_values):
    assert logits_of(linear(make()), pixel_values).shape == (4, 3)


@pytest.mark.parametrize(
    ("architecture", "arguments", "error", "message"),
    [
        (
            "deit_tiny_distilled_patch16_224",
            {},
            TypeError,
            "`model` must have one head, but got a VisionTransformerDis",
        ),
        ("vit_tiny_r_s16_p8_224", {"patch_size": 1}, TypeError, "PGN needs tokens of patches"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, ValueError, "`global_pool` must be 'token', 'avg' or another"),
    ],
)
def test_models_of_timm_that_a_head_would_not_suit_are_refused(architecture, arguments, error, message):
    config = TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=TIMM | arguments)
    with pytest.raises(error, match=message):
        get_peft_model(TimmWrapperForImageClassification(config).eval(), tiny_config(id2label=LABELS))


def test_a_timm_model_with_prompts_returns_no_feature_maps(pixel_values):
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=TIMM)
    model = get_peft_model(TimmWrapperForImageClassification(config).eval(), tiny_config())
    with pytest.raises(ValueError, match="`output_hidden_states` must be False for a model of timm with prompts"):
        model(pixel_values, output_hidden_states=True)
    with pytest.raises(ValueError, match="`model` must answer with its attention, but got a TimmWrapper"):
        attention_to_prompts(model, pixel_values)
    pixels = tiny_config(prompt_space="pixel", num_virtual_tokens=None, **SCALE)  # no tokens beside the patches
    model = get_peft_model(TimmWrapperForImageClassification(config).eval(), pixels)
    assert [maps.shape for maps in model(pixel_values, output_hidden_states=True).hidden_states] == [(4, 32, 4, 4)] * 2


@pytest.mark.parametrize("classes", [LABELS, {"cat": "a photo of a cat"}, "cat", [1, 2]])
def test_what_is_no_list_of_texts_is_not_taken_for_one(classes):
    with pytest.raises(TypeError, match="`classes` must be a list of names, or a list of descriptions"):
        embed_texts(two_towers(), tokenizer(), classes)


def test_texts_are_embedded_without_dropout():
    clip = two_towers()
    expected = embed_texts(clip, tokenizer(), NAMES)
    clip.config.text_config.attention_dropout = 0.5
    for part in clip.text_model.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    torch.testing.assert_close(embed_texts(clip.train(), tokenizer(), NAMES), expected)
    assert clip.training


@pytest.mark.parametrize("head", ["text", "trained"])
def test_a_client_for_embeddings_is_saved_and_loaded(head, tmp_path):
    model = get_peft_model(
        tiny_vit("CLIPVisionModelWithProjection"),
        tiny_config(head=head, id2label=LABELS, prompt_space="pixel", num_virtual_tokens=None, **SCALE),
    )
    if head == "text":
        with pytest.raises(ValueError, match="`text_embeds` must be unit vectors, given before"):
            make_prompter(model, PROCESSOR)
        use_texts(model, np.random.default_rng(0).normal(size=(3, model.config.projection_dim)).astype("float32"))
    prompter = make_prompter(model, PROCESSOR)
    prompter.save_pretrained(tmp_path)
    features = torch.randn(2, model.config.projection_dim)
    assert_same(ImagePrompter.from_pretrained(tmp_path).classify(features), prompter.classify(features))


def test_texts_are_there_however_they_were_loaded(pixel_values, tmp_path):
    model = adapted(two_towers())
    expected = logits_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    trained = PeftModel.from_pretrained(two_towers(), tmp_path, is_trainable=True)
    trained(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    second = adapted(two_towers())
    second.load_adapter(tmp_path, "two", is_trainable=True)
    second.set_adapter("two")
    assert_same(logits_of(second, pixel_values), expected)
    third = adapted(two_towers(), texts=False)
    set_peft_model_state_dict(third, get_peft_model_state_dict(model))
    assert_same(logits_of(third, pixel_values), expected)
    fourth = adapted(two_towers(), texts=False)
    fourth.load_state_dict(model.state_dict())
    assert_same(logits_of(fourth, pixel_values), expected)


@pytest.mark.parametrize(("name", "value"), [("text_embeds", 0.0), ("text_embeds", torch.inf), ("logit_scale", -1.0)])
def test_texts_that_cannot_be_used_are_not(name, value, pixel_values):
    model = adapted(two_towers())
    getattr(find_head(model).head("default"), name).fill_(value)
    with pytest.raises(ValueError, match="`text_embeds` must be unit vectors"):
        logits_of(model.eval(), pixel_values)


def test_an_adapter_without_its_texts_is_saved_with_a_warning(tmp_path, caplog):
    adapted(two_towers(), texts=False).save_pretrained(tmp_path)
    assert "saving 'default' without its texts" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: adapted(two_towers()), lambda: linear("TimmWrapperModel")], ids=["CLIP", "timm"]
)
def test_they_are_exported(make, tmp_path, pixel_values):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    Classifier(model, processor).export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"pixel_values": pixel_values.numpy()})
    torch.testing.assert_close(torch.tensor(found), logits_of(model, pixel_values), rtol=1e-3, atol=1e-3)


def test_the_base_in_a_mixed_batch_has_the_active_adapters_texts(pixel_values):
    fields = {"prompt_space": "pixel", "num_virtual_tokens": None, **SCALE}
    model = adapted(two_towers(), **fields)
    model.add_adapter("other", tiny_config(head="text", id2label=LABELS, **fields))
    use_texts(model, torch.randn(3, 16), adapter_name="other")
    model.eval()
    with model.disable_adapter():
        expected = logits_of(model, pixel_values)
    for names in (["__base__"] * 4, ["__base__", "other", "__base__", "default"]):
        mixed = logits_of(model, pixel_values, adapter_names=names)
        assert_same(mixed[[0, 2]], expected[[0, 2]])


def test_a_classifier_that_pgn_does_not_know_is_left_alone(pixel_values):
    class WithClassifier(ViTModel):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Linear(32, 7)

        def forward(self, *args, **kwargs):
            return self.classifier(super().forward(*args, **kwargs).last_hidden_state[:, 0])

    base = WithClassifier(tiny_vit("ViTModel").config).eval()
    structure = str(base)
    with pytest.raises(ValueError, match="with a 'classifier' of its own"):
        get_peft_model(base, tiny_config(id2label=LABELS))
    assert str(base) == structure
    assert get_peft_model(base, tiny_config())(pixel_values).shape == (4, 7)


def test_siglips_image_tower_needs_scale_and_bias(pixel_values):
    model = adapted(tiny_vit("SiglipVisionModel"), texts=False)
    with pytest.raises(ValueError, match="`logit_scale` and `logit_bias` must be given for a SiglipVisionModel"):
        use_texts(model, torch.randn(3, 32))
    use_texts(model, torch.randn(3, 32), logit_scale=112, logit_bias=-16)
    assert logits_of(model, pixel_values).shape == (4, 3)


def test_wrappers_do_not_hide_scale_and_bias():
    model = adapted(two_towers("SiglipModel"), texts=False)
    use_texts(nn.DataParallel(model), torch.randn(3, 32))
    head, base = find_head(model).head("default"), model.get_base_model()
    torch.testing.assert_close(head.logit_scale, base.logit_scale.exp()[0].detach())
    torch.testing.assert_close(head.logit_bias, base.logit_bias[0].detach())


def test_an_adapter_with_labels_follows_the_switch(pixel_values):
    base = tiny_vit("ViTModel")
    before = answer(base, pixel_values)
    model = get_peft_model(base, tiny_config())
    model.base_model.disable_adapter_layers()
    model.add_adapter("b", tiny_config(id2label=LABELS))
    model.set_adapter("b")
    assert torch.equal(answer(model.eval(), pixel_values), before)
    model.base_model.enable_adapter_layers()
    assert logits_of(model, pixel_values).shape == (4, 3)


def test_a_processor_of_another_size_is_refused_where_the_model_takes_one_only(tmp_path, pixel_values):
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=TIMM)
    model = get_peft_model(TimmWrapperForImageClassification(config).eval(), tiny_config())
    larger = ViTImageProcessor(size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match="`image_processor` must make images of 32 x 32 pixels"):
        Classifier(model, larger).pipeline()
    with pytest.raises(ValueError, match=r"but got 48 x 48. Resize the images\.$"):
        model(torch.randn(1, 3, 48, 48))


def test_calls_with_texts(pixel_values):
    clip = two_towers()
    inputs = dict(tokenizer()(NAMES, padding="max_length", max_length=12, return_tensors="pt"))
    own = clip(inputs["input_ids"], pixel_values).logits_per_image
    model = adapted(clip)
    with pytest.raises(ValueError, match="`input_ids` must be left out where an adapter with a head is active"):
        model(pixel_values=pixel_values, **inputs)
    trained = get_peft_model(two_towers(), tiny_config(id2label=LABELS)).eval()
    with trained.disable_adapter(), torch.no_grad():
        assert_same(trained(inputs["input_ids"], pixel_values).logits_per_image, own.detach())
        assert_same(trained(pixel_values=pixel_values, **inputs).logits_per_image, own.detach())


def test_the_class_of_an_adapted_model_loads_plain_ones(tmp_path, pixel_values):
    tiny_vit("ViTModel").save_pretrained(tmp_path)
    plain = type(linear().get_base_model()).from_pretrained(tmp_path)
    assert type(plain) is ViTModel
    assert_same(answer(plain, pixel_values), answer(tiny_vit("ViTModel"), pixel_values))


def test_a_head_alone_beside_an_adapter_without_texts(pixel_values):
    model = adapted(two_towers(), texts=False)
    model.add_adapter("lin", tiny_config(id2label=LABELS))
    batches = [{"pixel_values": pixel_values.repeat(3, 1, 1, 1), "labels": torch.arange(12) % 3}]
    assert head_alone(model, batches, batches, "lin").own is None
    with pytest.raises(
        ValueError, match="`train_batches` and `eval_batches` must have `labels`, but got pixel_values"
    ):
        head_alone(model, [{"pixel_values": pixel_values}], batches, "lin")


def test_a_base_without_some_of_its_weights_is_refused(tmp_path):
    tiny_vit("ViTModel").save_pretrained(tmp_path / "base")
    model = linear(ViTModel.from_pretrained(tmp_path / "base"))
    Classifier(model, ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(tmp_path / "adapter")
    assert load_classifier(tmp_path / "adapter").pipeline()(Image.new("RGB", (32, 32)))
    weights = tiny_vit("ViTModel").state_dict()
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    tiny_vit("ViTModel").save_pretrained(tmp_path / "base", state_dict=kept)
    with pytest.raises(
        ValueError, match="`base_model_name_or_path` must hold all weights of a ViTModel, but got none"
    ):
        load_classifier(tmp_path / "adapter")


def test_a_copy_keeps_its_own_head(pixel_values):
    model = linear()
    copied = copy.deepcopy(model)
    model.unload()
    assert logits_of(copied, pixel_values).shape == (4, 3)
