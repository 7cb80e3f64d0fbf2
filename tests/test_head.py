"""The adapter owns its head: where it starts from, which labels show, what is refused."""

import pytest
import torch
from conftest import (
    answer,
    assert_same,
    move_adapter,
    own_adapter_methods,
    refused,
    tiny_config,
    tiny_vit,
)
from peft import AutoPeftModel, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from pgn_peft import Classifier, PGNConfig

NAMES = {0: "cat", 1: "dog"}


def head_of(model):
    return model.get_base_model().classifier


def own_parts(model):
    """Names of the adapter's parts that are trained."""
    return {name.split(".pgn_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("given", [{}, {"num_labels": 5}, {"id2label": dict(enumerate("abcde"))}])
def test_the_models_labels_start_from_the_models_head(given):
    base = tiny_vit()
    base.config.id2label = dict(enumerate("abcde"))
    weight = base.classifier.weight.clone()
    model = get_peft_model(base, tiny_config(**given))
    head = head_of(model).head("default")
    assert torch.equal(head.weight, weight)
    assert head.weight.data_ptr() != base.classifier.base_layer.weight.data_ptr()
    assert model.peft_config["default"].id2label == dict(enumerate("abcde"))
    assert model.peft_config["default"].num_labels == 5


@pytest.mark.parametrize(
    ("num_labels", "given", "names"),
    [
        (1000, {"id2label": NAMES}, ["cat", "dog"]),
        (1000, {"num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        (2, {"id2label": NAMES}, ["cat", "dog"]),  # as many as the model's, but others
    ],
)
def test_other_labels_start_from_a_new_head(num_labels, given, names, pixel_values):
    base = tiny_vit(num_labels=num_labels)
    model = get_peft_model(base, tiny_config(**given))
    head = head_of(model).head("default")
    assert head.weight.shape == (2, 32)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(head.bias, torch.zeros(2))
    assert list(model.config.id2label.values()) == names
    assert answer(model, pixel_values).shape == (4, 2)
    # A second adapter without labels takes the base's, not the active one's.
    model.add_adapter("second", tiny_config())
    assert model.peft_config["second"].num_labels == num_labels
    assert model.config.num_labels == 2


def test_a_frozen_head_trains_only_prompts(pixel_values):
    base = tiny_vit()
    before = answer(base, pixel_values)
    model = get_peft_model(base, tiny_config(head="frozen", problem_type="multi_label_classification")).eval()
    assert own_parts(model) == {"generator", "library"}
    assert model.config.num_labels == 5
    features = model.get_base_model().vit(pixel_values).last_hidden_state[:, 0]
    assert_same(answer(model, pixel_values), head_of(model).base_layer(features).detach())
    assert not torch.equal(answer(model, pixel_values), before)
    targets = torch.eye(5)[:4]
    outputs = model(pixel_values, labels=targets)
    assert_same(outputs.loss, nn.functional.binary_cross_entropy_with_logits(outputs.logits, targets))
    with model.disable_adapter():
        assert model.config.problem_type is None


def empty_classifier():
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=0)).eval()


def look_alike_with_mlp():
    return LookAlike(nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5)))


@pytest.mark.parametrize(
    ("make", "fields", "error", "word"),
    [
        (tiny_vit, {"head": "frozen", "id2label": NAMES}, ValueError, "frozen"),
        (lambda: tiny_vit("ViTModel"), {"head": "frozen", "num_labels": 3}, ValueError, "head"),
        (empty_classifier, {}, ValueError, "num_labels"),
        (look_alike_with_mlp, {"target_modules": "embeddings", "id2label": NAMES}, ValueError, "Sequential"),
    ],
)
def test_heads_that_cannot_be_are_refused(make, fields, error, word):
    base = make()
    before = str(base)
    with refused(error, word):
        get_peft_model(base, tiny_config(**fields))
    assert str(base) == before


def test_a_classifier_without_labels_gets_some(pixel_values):
    model = get_peft_model(empty_classifier(), tiny_config(id2label=NAMES))
    assert answer(model, pixel_values).shape == (4, 2)
    with model.disable_adapter():
        assert answer(model, pixel_values).shape == (4, 32)
        assert model.config.num_labels == 0


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_every_loader_takes_the_adapter_onto_the_original_base(architecture, pixel_values, tmp_path):
    """A head of another size in `modules_to_save` fails in all of these with a size mismatch."""
    tiny_vit(architecture, num_labels=1000).save_pretrained(tmp_path / "base")
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = move_adapter(get_peft_model(auto, tiny_config(id2label=NAMES))).eval()
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path / "adapter")

    def base():
        return AutoModelForImageClassification.from_pretrained(tmp_path / "base")

    injected = base()
    injected.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    for loaded in (
        PeftModel.from_pretrained(base(), tmp_path / "adapter"),
        AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
        injected,
    ):
        assert_same(answer(loaded, pixel_values), expected)
        assert loaded.config.id2label == NAMES
        assert loaded.config.label2id == {"cat": 0, "dog": 1}
        assert not loaded.training


@own_adapter_methods
def test_transformers_own_adapter_methods(pixel_values, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    before = answer(model, pixel_values)
    model.add_adapter(tiny_config(id2label=NAMES), adapter_name="mine")
    move_adapter(model).eval()
    expected = answer(model, pixel_values)
    assert model.config.id2label == NAMES
    model.disable_adapters()
    assert torch.equal(answer(model, pixel_values), before)
    assert model.config.num_labels == 5
    model.enable_adapters()
    assert torch.equal(answer(model, pixel_values), expected)

    model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.joinpath("adapter").glob("*.bin"))
    for loaded in (
        AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert_same(answer(loaded, pixel_values), expected)

    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(tiny_config(num_labels=3), adapter_name="second")
    assert answer(model, pixel_values).shape == (4, 3)
    model.set_adapter("mine")
    assert torch.equal(answer(model, pixel_values), expected)
    assert model.config.id2label == NAMES
    model.delete_adapter(["mine", "second"])
    assert torch.equal(answer(model, pixel_values), before)
    assert model.config.num_labels == 5


class LookAlike(nn.Module):
    """Somebody's own classifier around a ViT."""

    def __init__(self, head):
        super().__init__()
        self.backbone = tiny_vit("ViTModel")
        self.classifier = head

    def forward(self, pixel_values):
        return self.classifier(self.backbone(pixel_values).last_hidden_state[:, 0])


@pytest.mark.parametrize("target", ["backbone.embeddings", ["embeddings"]])
def test_a_look_alike_is_adapted_by_naming_its_embeddings(target, pixel_values, tmp_path):
    torch.manual_seed(0)
    base = LookAlike(nn.Linear(32, 5)).eval()
    before = base(pixel_values)
    model = move_adapter(get_peft_model(base, tiny_config(target_modules=target, id2label=NAMES))).eval()
    expected = model(pixel_values)
    assert expected.shape == (4, 2)
    with model.disable_adapter():
        assert torch.equal(model(pixel_values), before)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LookAlike(nn.Linear(32, 5)).eval(), tmp_path, adapter_name="other")
    assert_same(loaded(pixel_values), expected)
    # With a head of its own, which is trained in place or left alone.
    trained = get_peft_model(loaded.unload(), tiny_config(target_modules=target))
    head = trained.get_base_model().classifier
    assert torch.equal(head.head("default").weight, head.base_layer.weight)
    frozen = get_peft_model(trained.unload(), tiny_config(target_modules=target, head="frozen"))
    assert frozen.peft_config["default"].num_labels == 5
    assert frozen(pixel_values).shape == (4, 5)


def test_an_adapter_of_the_same_name_replaces_all_of_the_earlier_one(pixel_values):
    base = tiny_vit()
    get_peft_model(base, tiny_config(id2label=NAMES))
    with pytest.warns(UserWarning, match="for a second time"):
        model = get_peft_model(base, tiny_config(generator="static", head="frozen")).eval()
    parts = {name.split(".pgn_")[1].split(".")[0] for name, _ in model.named_parameters() if "pgn_" in name}
    assert parts == {"library"}
    assert answer(model, pixel_values).shape == (4, 5)
    assert model.config.num_labels == 5


def test_a_subclass_counts_as_its_architecture(pixel_values):
    class MyViT(ViTForImageClassification):
        pass

    model = get_peft_model(MyViT(tiny_vit().config).eval(), tiny_config(id2label=NAMES))
    assert answer(model, pixel_values).shape == (4, 2)
    assert isinstance(model.get_base_model().vit, ViTModel)


def test_names_that_are_numbers_in_the_models_config_become_strings():
    base = tiny_vit(num_labels=2)
    base.config.id2label = {0: 3, 1: 8}
    model = get_peft_model(base, tiny_config())
    assert torch.equal(head_of(model).head("default").weight, base.classifier.base_layer.weight)
    assert model.config.id2label == model.peft_config["default"].id2label == {0: "3", 1: "8"}


@pytest.mark.parametrize(
    ("door", "num_labels", "labels", "inferred"),
    [
        ("PEFT", 1, torch.rand(4), "regression"),
        ("PEFT", 2, torch.rand(4, 2), "multi_label_classification"),
        pytest.param(
            "Transformers", 2, torch.tensor([0, 1, 1, 0]), "single_label_classification", marks=own_adapter_methods
        ),
        ("Classifier", 2, torch.tensor([0, 1, 1, 0]), "single_label_classification"),
    ],
)
def test_a_problem_type_that_was_inferred_is_saved_and_kept(
    door, num_labels, labels, inferred, pixel_values, tmp_path
):
    config = tiny_config(num_labels=num_labels)
    model = tiny_vit()
    if door == "Transformers":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    model(pixel_values, labels=labels)
    if door == "PEFT":
        with model.disable_adapter():
            assert model.config.problem_type is None
    assert model.config.problem_type == inferred
    if door == "Classifier":
        Classifier(model, ViTImageProcessor()).save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    assert PGNConfig.from_pretrained(tmp_path).problem_type == inferred
    assert PeftModel.from_pretrained(tiny_vit(), tmp_path).config.problem_type == inferred
