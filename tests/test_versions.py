"""Adapters that other versions saved: older ones load and answer the same, unknown fields do no harm."""

import pytest
from conftest import answer, assert_same, edit_json, move_adapter, refused, tiny_config, tiny_vit
from make_golden import ADAPTERS, GOLDEN, base_of, golden_images
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from pgn_peft import PGNConfig


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_version_0_1_still_answers_the_same(name):
    base = ViTForImageClassification.from_pretrained(GOLDEN / base_of(name))
    model = PeftModel.from_pretrained(base, GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    in_pixels = "prompt_space" in ADAPTERS[name]
    assert_same(answer(model, golden_images()), expected, 1e-4, valid_pixels=in_pixels)
    assert expected.std() > 0.1
    config = model.peft_config["default"]
    labels = ADAPTERS[name].get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    assert model.config.id2label == config.id2label == labels
    assert config.pgn_peft_version == "0.1.0"


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and what it answers."""
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(num_labels=2))).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tiny_vit().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", answer(model, golden_images())


def load_adapter(folder):
    model = tiny_vit()
    model.load_adapter(str(folder))
    return model


LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_vit(), folder),
    "AutoPeftModel": lambda folder: AutoPeftModel.from_pretrained(folder),
    "Transformers": load_adapter,
}
loaders = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@loaders
def test_an_unknown_field_is_left_out_with_a_warning(load, saved):
    folder, expected = saved
    edit_json(folder / "adapter_config.json", added_by_another_tool=None)
    with pytest.warns(UserWarning, match="added_by_another_tool"):
        model = load(folder)
    assert_same(answer(model, golden_images()), expected)


@loaders
def test_a_newer_version_alone_is_no_reason_to_refuse(load, saved):
    folder, expected = saved
    edit_json(folder / "adapter_config.json", pgn_peft_version="9.1")
    assert_same(answer(load(folder), golden_images()), expected)


@pytest.mark.parametrize(
    ("field", "value"), [("generator", "vit-tiny"), ("mixing", "top-8"), ("num_virtual_tokens", "auto")]
)
def test_values_that_this_version_does_not_know_are_refused(field, value, saved):
    folder, _ = saved
    edit_json(folder / "adapter_config.json", pgn_peft_version="9.1", **{field: value})
    with refused((ValueError, TypeError), field, value):
        PeftModel.from_pretrained(tiny_vit(), folder)


def test_a_misspelt_field_is_a_type_error():
    with pytest.raises(TypeError, match="librarysize"):
        PGNConfig(librarysize=3)
