"""Heads that adapters bring to models without one: made, trained, copied, saved, given back."""

import copy
import pickle

import pytest
import torch
import train_image_classifier
from conftest import answer, assert_same, move_adapter, refused, tiny_config, tiny_vit
from image_data import smoke_arguments
from peft import PeftModel, get_peft_model
from PIL import Image
from test_texts import LABELS, PROCESSOR, adapted, logits_of
from tiny_clip import two_towers
from torch import nn
from transformers import (
    BeitModel,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessor,
    ViTModel,
)

from pgn_peft import Classifier, load_classifier
from pgn_peft.training import linear_probe
from pgn_peft.tuner.head import find_head

HEADLESS = [
    "ViTModel",
    "Dinov2WithRegistersModel",
    "CLIPVisionModelWithProjection",
    "SiglipVisionModel",
    "DINOv3ViTModel",
    "BeitModel",
    "Aimv2VisionModel",
    "TimmWrapperModel",
]
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def linear(architecture="ViTModel", **overrides):
    base = tiny_vit(architecture) if isinstance(architecture, str) else architecture
    return move_adapter(get_peft_model(base, tiny_config(id2label=LABELS, **overrides))).eval()


@pytest.mark.parametrize("architecture", HEADLESS)
def test_a_model_without_a_head_gets_one_and_gives_it_back(architecture, pixel_values, tmp_path):
    base = tiny_vit(architecture)
    before, structure, config, kind = answer(base, pixel_values), str(base), base.config.to_dict(), type(base)
    model = linear(base)
    expected = logits_of(model, pixel_values)
    assert expected.shape == (4, 3)
    assert model.config.id2label == LABELS
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(architecture), tmp_path)
    assert_same(logits_of(loaded, pixel_values), expected)
    inside = tiny_vit(architecture)
    inside.load_adapter(str(tmp_path))
    assert_same(logits_of(inside.eval(), pixel_values), expected)
    unloaded = model.unload()
    assert type(unloaded) is kind
    assert str(unloaded) == structure
    assert unloaded.config.to_dict() == config
    assert_same(answer(unloaded, pixel_values), before)


def test_copies_have_a_head_and_a_switch_of_their_own(pixel_values):
    model = linear()
    expected = logits_of(model, pixel_values)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with model.disable_adapter():
        for copied in copies:
            assert_same(logits_of(copied, pixel_values), expected)
    model.unload()
    assert_same(logits_of(copies[0], pixel_values), expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["ViTModel", "TimmWrapperModel"])
def test_it_compiles_to_one_graph(architecture, pixel_values):
    model = linear(architecture)
    torch._dynamo.reset()  # which counts compilations of all models together
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(logits_of(compiled, pixel_values), logits_of(model, pixel_values))


@pytest.mark.parametrize(("architecture", "reference"), [("ViTModel", "ViTFor"), ("Dinov2Model", "Dinov2For")])
def test_such_a_head_reads_what_transformers_classifiers_read(architecture, reference, pixel_values):
    model, classifier = linear(architecture), linear(f"{reference}ImageClassification")
    names = {name.partition(".pgn_")[2]: tensor for name, tensor in model.state_dict().items() if ".pgn_" in name}
    for name, tensor in classifier.state_dict().items():
        if ".pgn_" in name:
            tensor.copy_(names[name.partition(".pgn_")[2]])
    backbone = getattr(classifier.get_base_model(), reference.lower().removesuffix("for"))
    own = {name: tensor for name, tensor in backbone.state_dict().items() if "pgn_" not in name}
    model.get_base_model().load_state_dict(own, strict=False)
    assert_same(logits_of(model, pixel_values), logits_of(classifier, pixel_values))


def test_an_added_head_has_the_models_mode_device_and_precision():
    head = find_head(get_peft_model(tiny_vit("ViTModel").eval(), tiny_config(id2label=LABELS)))
    assert not head.training
    assert not head.head("default").training
    model = get_peft_model(two_towers().to("meta"), tiny_config(head="text", id2label=LABELS))
    own = [tensor for name, tensor in model.state_dict().items() if ".pgn_" in name]
    assert {tensor.device.type for tensor in own} == {"meta"}
    half = tiny_vit("ViTModel").to(torch.bfloat16)
    model = get_peft_model(half, tiny_config(id2label=LABELS), autocast_adapter_dtype=False)
    assert find_head(model).head("default").weight.dtype == torch.bfloat16


def siglip_without_its_pool():
    config = tiny_vit("SiglipVisionModel").config
    config.vision_use_head = False
    return SiglipVisionModel(config).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BeitModel(tiny_vit("BeitModel").config, add_pooling_layer=False).eval(),
        siglip_without_its_pool,
        lambda: TimmWrapperModel(
            TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM, do_pooling=False)
        ).eval(),
    ],
    ids=["BEiT", "SigLIP", "timm"],
)
def test_models_that_were_made_without_their_pool_classify(make, pixel_values):
    assert logits_of(linear(make()), pixel_values).shape == (4, 3)


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
    assert_same(torch.tensor(found), logits_of(model, pixel_values), tolerance=1e-3)


def test_a_classifier_that_pgn_does_not_know_is_left_alone(pixel_values):
    class WithClassifier(ViTModel):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Linear(32, 7)

        def forward(self, *args, **kwargs):
            return self.classifier(super().forward(*args, **kwargs).last_hidden_state[:, 0])

    base = WithClassifier(tiny_vit("ViTModel").config).eval()
    structure = str(base)
    with refused(ValueError, "classifier"):
        get_peft_model(base, tiny_config(id2label=LABELS))
    assert str(base) == structure
    assert get_peft_model(base, tiny_config())(pixel_values).shape == (4, 7)


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


def test_labels_are_refused_while_no_head_is_active(pixel_values):
    model = linear()
    with model.disable_adapter(), refused(ValueError, "labels"):
        model(pixel_values, labels=torch.tensor([0, 1, 2, 0]))


def test_the_class_of_an_adapted_model_loads_plain_ones(tmp_path, pixel_values):
    tiny_vit("ViTModel").save_pretrained(tmp_path)
    plain = type(linear().get_base_model()).from_pretrained(tmp_path)
    assert type(plain) is ViTModel
    assert_same(answer(plain, pixel_values), answer(tiny_vit("ViTModel"), pixel_values))


def test_what_a_head_alone_reaches_is_measured_on_them_too(pixel_values):
    batches = [{"pixel_values": pixel_values.repeat(3, 1, 1, 1), "labels": torch.arange(12) % 3}]
    for model, has_texts in ((adapted(two_towers()), True), (linear(), False)):
        found = linear_probe(model, batches, batches)
        assert 0 <= found.linear <= 1
        assert (found.own is None) != has_texts
        assert logits_of(model, pixel_values).shape == (4, 3)


def test_a_base_without_some_of_its_weights_is_refused(tmp_path):
    tiny_vit("ViTModel").save_pretrained(tmp_path / "base")
    model = linear(ViTModel.from_pretrained(tmp_path / "base"))
    Classifier(model, ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(tmp_path / "adapter")
    assert load_classifier(tmp_path / "adapter").pipeline()(Image.new("RGB", (32, 32)))
    weights = tiny_vit("ViTModel").state_dict()
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    tiny_vit("ViTModel").save_pretrained(tmp_path / "base", state_dict=kept)
    with refused(ValueError, "ViTModel"):
        load_classifier(tmp_path / "adapter")


@pytest.mark.slow
def test_the_script_trains_a_head_on_a_model_without_one(tmp_path):
    command = smoke_arguments(tmp_path)
    command[command.index("--model_name_or_path") + 1] = str(tmp_path / "dino")
    tiny_vit("DINOv3ViTModel").save_pretrained(tmp_path / "dino")
    PROCESSOR.save_pretrained(tmp_path / "dino")
    train_image_classifier.main([*command, "--num_train_epochs", "1"])
    classifier = load_classifier(command[command.index("--output_dir") + 1])
    assert classifier.pipeline()(Image.new("RGB", (40, 32), "red"))[0]["score"] <= 1
