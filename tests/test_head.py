"""The adapter owns its head: where it starts from, which labels show, what is refused."""

import pytest
import torch
from conftest import (
    REPRESENTATIVE_CLASSIFIERS,
    answer,
    assert_same,
    move_adapter,
    own_adapter_methods,
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
from pgn_peft.tuner.head import PGNHead

NAMES = {0: "cat", 1: "dog"}


def head_of(model):
    return model.get_base_model().classifier


def test_the_models_labels_start_from_the_models_head():
    base = tiny_vit()
    base.config.id2label = dict(enumerate(["a", "b", "c", "d", "e"]))
    weight = base.classifier.weight.clone()
    for given in ({}, {"num_labels": 5}, {"id2label": dict(base.config.id2label)}):
        model = get_peft_model(tiny_vit(), tiny_config())
        model = model.unload()
        model.config.id2label = dict(base.config.id2label)
        adapted = get_peft_model(model, tiny_config(**given))
        head = head_of(adapted).pgn_head["default"]
        assert torch.equal(head.weight, weight)
        assert head.weight.data_ptr() != weight.data_ptr()
        assert adapted.peft_config["default"].id2label == base.config.id2label
        assert adapted.peft_config["default"].num_labels == 5
        adapted.unload()


@pytest.mark.parametrize(
    ("given", "names"),
    [({"id2label": NAMES}, ["cat", "dog"]), ({"num_labels": 2}, ["LABEL_0", "LABEL_1"])],
)
def test_other_labels_start_from_a_new_head(given, names, pixel_values):
    model = get_peft_model(tiny_vit(num_labels=1000), tiny_config(**given))
    head = head_of(model).pgn_head["default"]
    assert head.weight.shape == (2, 32)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(head.bias, torch.zeros(2))
    assert list(model.config.id2label.values()) == names
    assert answer(model, pixel_values).shape == (4, 2)


def test_same_number_of_other_names_is_a_new_head():
    model = get_peft_model(tiny_vit(num_labels=2), tiny_config(id2label=NAMES))
    head = head_of(model)
    assert not torch.equal(head.pgn_head["default"].weight, head.base_layer.weight)


def test_a_second_adapter_without_labels_takes_the_bases_not_the_active_ones():
    model = get_peft_model(tiny_vit(), tiny_config(id2label=NAMES))
    assert model.config.num_labels == 2
    model.add_adapter("second", tiny_config())
    assert model.peft_config["second"].num_labels == 5
    assert model.config.num_labels == 2


def test_frozen_head_trains_only_prompts(pixel_values):
    base = tiny_vit()
    before = answer(base, pixel_values)
    model = get_peft_model(base, tiny_config(head="frozen")).eval()
    assert not any("pgn_head" in name for name, _ in model.named_parameters())
    assert {name.split(".pgn_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "generator",
        "library",
    }
    assert model.config.num_labels == 5
    features = model.get_base_model().vit(pixel_values).last_hidden_state[:, 0]
    assert_same(answer(model, pixel_values), head_of(model).base_layer(features).detach())
    assert not torch.equal(answer(model, pixel_values), before)


def test_frozen_head_with_other_labels_is_refused():
    with pytest.raises(ValueError, match="`num_labels` must be 5, that of the model, with head='frozen', but got 2"):
        get_peft_model(tiny_vit(), tiny_config(head="frozen", id2label=NAMES))


@pytest.mark.parametrize("architecture", REPRESENTATIVE_CLASSIFIERS)
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


def test_frozen_head_with_other_names_is_refused_and_another_problem_type_is_followed(pixel_values):
    with pytest.raises(ValueError, match="`id2label` must be the model's own with head='frozen', but got {0: 'v'"):
        get_peft_model(tiny_vit(), tiny_config(head="frozen", id2label=dict(enumerate("vwxyz"))))
    model = get_peft_model(tiny_vit(), tiny_config(head="frozen", problem_type="multi_label_classification"))
    targets = torch.eye(5)[:4]
    outputs = model(pixel_values, labels=targets)
    expected = nn.functional.binary_cross_entropy_with_logits(outputs.logits, targets)
    torch.testing.assert_close(outputs.loss, expected)
    with model.disable_adapter():
        assert model.config.problem_type is None


def test_a_backbone_for_features_has_no_head():
    model = get_peft_model(tiny_vit("ViTModel"), tiny_config())
    assert not any(isinstance(module, PGNHead) for module in model.modules())
    with pytest.raises(ValueError, match="`head` must be 'trained' for labels on a ViTModel, which has no head"):
        get_peft_model(tiny_vit("ViTModel"), tiny_config(num_labels=3, head="frozen"))


def test_a_classifier_without_labels_needs_some(pixel_values):
    def empty():
        return ViTForImageClassification(
            ViTConfig(
                image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=0
            )
        ).eval()

    with pytest.raises(ValueError, match="`num_labels` must be given for a ViTForImageClassification without labels"):
        get_peft_model(empty(), tiny_config())
    model = get_peft_model(empty(), tiny_config(id2label=NAMES))
    assert answer(model, pixel_values).shape == (4, 2)
    with model.disable_adapter():
        assert answer(model, pixel_values).shape == (4, 32)
        assert model.config.num_labels == 0


class LookAlike(nn.Module):
    """Somebody's own classifier around a ViT."""

    def __init__(self, head):
        super().__init__()
        self.backbone = tiny_vit("ViTModel")
        self.classifier = head

    def forward(self, pixel_values):
        return self.classifier(self.backbone(pixel_values).last_hidden_state[:, 0])


@pytest.mark.parametrize("target", ["backbone.embeddings", "embeddings", ["backbone.embeddings"]])
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


def test_a_look_alike_keeps_its_own_head(pixel_values):
    torch.manual_seed(0)
    base = LookAlike(nn.Linear(32, 5)).eval()
    frozen = get_peft_model(base, tiny_config(target_modules="embeddings", head="frozen")).eval()
    assert frozen.peft_config["default"].num_labels == 5
    assert frozen(pixel_values).shape == (4, 5)
    trained = get_peft_model(frozen.unload(), tiny_config(target_modules="embeddings")).get_base_model()
    assert torch.equal(trained.classifier.pgn_head["default"].weight, trained.classifier.base_layer.weight)


def test_an_adapter_of_the_same_name_replaces_all_of_the_earlier_one(pixel_values):
    base = tiny_vit()
    get_peft_model(base, tiny_config(id2label=NAMES))
    with pytest.warns(UserWarning, match="for a second time"):
        model = get_peft_model(base, tiny_config(generator="static", head="frozen")).eval()
    parts = {name.split(".pgn_")[1].split(".")[0] for name, _ in model.named_parameters() if "pgn_" in name}
    assert parts == {"library"}
    assert answer(model, pixel_values).shape == (4, 5)
    assert model.config.num_labels == 5


def test_a_look_alikes_head_must_be_linear_or_be_left_alone(pixel_values):
    mlp = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(TypeError, match="must have a linear head, but got a Sequential at 'classifier'"):
        get_peft_model(LookAlike(mlp), tiny_config(target_modules="embeddings", id2label=NAMES))


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
    assert torch.equal(head_of(model).pgn_head["default"].weight, base.classifier.base_layer.weight)
    assert model.config.id2label == model.peft_config["default"].id2label == {0: "3", 1: "8"}


def load_offloaded(folder, parts, tmp_path):
    places = dict.fromkeys(["vit.embeddings", "vit.layers", "vit.layernorm", "classifier"], "cpu")
    places |= dict.fromkeys(parts, "disk")
    return ViTForImageClassification.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("fields", [{}, {"prompt_space": "pixel", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}])
def test_a_new_adapter_starts_from_weights_on_a_disk(fields, tmp_path, pixel_values):
    tiny_vit().save_pretrained(tmp_path)
    found = []
    for parts in [], ["vit.embeddings", "classifier"]:
        torch.manual_seed(0)
        config = tiny_config(**fields, num_virtual_tokens=None if fields else 3)
        model = get_peft_model(load_offloaded(tmp_path, parts, tmp_path), config).eval()
        assert not any(parameter.is_meta for name, parameter in model.named_parameters() if "pgn_" in name)
        found.append(answer(model, pixel_values))
    assert_same(*found, valid_pixels=bool(fields))


@pytest.mark.parametrize("part", ["vit.embeddings", "classifier"])
def test_a_saved_adapter_is_refused_where_its_weights_would_not_be_loaded(part, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    get_peft_model(tiny_vit(), tiny_config()).save_pretrained(tmp_path / "adapter")
    for load in (
        lambda: load_offloaded(tmp_path, [part], tmp_path).load_adapter(tmp_path / "adapter"),
        lambda: PeftModel.from_pretrained(load_offloaded(tmp_path, [part], tmp_path), str(tmp_path / "adapter")),
    ):
        with pytest.raises(ValueError, match=f"`device_map` must keep '{part}' in memory .* but got .*: 'disk'"):
            load()


@pytest.mark.parametrize("door", ["PEFT", pytest.param("Transformers", marks=own_adapter_methods), "Classifier"])
@pytest.mark.parametrize(
    ("num_labels", "labels", "inferred"),
    [
        (1, torch.rand(4), "regression"),
        (2, torch.tensor([0, 1, 1, 0]), "single_label_classification"),
        (2, torch.rand(4, 2), "multi_label_classification"),
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
