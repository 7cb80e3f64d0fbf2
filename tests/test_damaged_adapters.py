"""Adapters that are damaged, incomplete or made for another model are refused, and nothing is lost."""

import os

import pytest
import torch
from conftest import answer, edit_json, move_adapter, refused, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model():
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(id2label={0: "cat", 1: "dog"}))).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A folder with an adapter."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("made_for", "loaded_on", "words"),
    [
        ({}, {"hidden_size": 64}, ("hidden_size", 32, 64)),
        ({}, {"num_channels": 1}, ("num_channels", 1, 3)),
        ({}, {"architecture": "DeiTForImageClassification"}, ("DeiTForImageClassification",)),
        ({}, {"architecture": "ViTModel"}, ("ViTForImageClassification", "ViTModel")),
        ({"architecture": "ViTModel"}, {}, ("ViTForImageClassification", "ViTModel")),
    ],
)
def test_an_adapter_made_for_another_model_is_refused(made_for, loaded_on, words, tmp_path):
    get_peft_model(tiny_vit(**made_for), tiny_config()).save_pretrained(tmp_path)
    other = tiny_vit(**loaded_on)
    before = str(other)
    with refused(ValueError, *words):
        PeftModel.from_pretrained(other, tmp_path)
    with refused(ValueError, *words):
        other.load_adapter(str(tmp_path))
    assert str(other) == before


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop(tensors):
    del tensors[next(name for name in tensors if name.endswith("library.tokens"))]


def add(tensors):
    tensors["base_model.model.vit.embeddings.pgn_library.extra"] = torch.zeros(2)


def reshape(tensors):
    tensors["base_model.model.classifier.pgn_head.weight"] = torch.zeros(7, 32)


def poison(tensors):
    tensors["base_model.model.classifier.pgn_head.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "word"),
    [(drop, "tokens"), (add, "extra"), (reshape, "(7, 32)"), (poison, "pgn_head")],
)
def test_tampered_weights_are_refused_before_the_model_is_touched(change, word, saved, model, pixel_values):
    expected = answer(model, pixel_values)
    edit_weights(saved, change)
    base = tiny_vit()
    before = str(base)
    for load in (
        lambda: PeftModel.from_pretrained(base, saved),
        lambda: model.load_adapter(saved, adapter_name="second"),
        lambda: set_peft_model_state_dict(model, load_file(saved / WEIGHTS)),
    ):
        with refused(ValueError, word):
            load()
    assert str(base) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"generator_width": 8},
        {"generator": "static", "static_prompts": False},
        {"generator_rank": 2},
        {"num_virtual_tokens": 65_536},
        {"num_labels": 4, "id2label": None},
        {"head": "frozen"},
        {"modules_to_save": ["vit.layernorm"]},
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused(change, saved):
    edit_json(saved / "adapter_config.json", **change)
    base = tiny_vit()
    before = str(base)
    with pytest.raises(ValueError, match="."):
        PeftModel.from_pretrained(base, saved)
    assert str(base) == before


def test_a_failed_load_onto_an_existing_adapter_keeps_it(model, pixel_values, tmp_path):
    model.add_adapter("trained", tiny_config(num_labels=2))
    move_adapter(model, seed=4)
    model.set_adapter("trained")
    expected = answer(model, pixel_values)
    model.set_adapter("default")
    get_peft_model(tiny_vit(), tiny_config(num_labels=3)).save_pretrained(tmp_path / "other")
    with refused(ValueError, "pgn_head"):
        model.load_adapter(tmp_path / "other", adapter_name="trained")
    model.set_adapter("trained")
    assert torch.equal(answer(model, pixel_values), expected)


def test_transformers_own_loader_refuses_other_shapes(saved):
    edit_weights(saved, reshape)
    with pytest.raises((RuntimeError, ValueError), match="mismatch|with all tensors"):
        tiny_vit().load_adapter(str(saved))


@pytest.mark.parametrize(("damage", "error"), [("cut", ValueError), ("missing", OSError)])
def test_a_file_that_is_cut_or_missing_is_refused_before_the_model_is_touched(damage, error, saved, model):
    file = saved / WEIGHTS
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    base = tiny_vit()
    before = str(base)
    for load in (
        lambda: PeftModel.from_pretrained(base, saved),
        lambda: PeftModel.from_pretrained(base, str(saved)),
        lambda: model.load_adapter(saved, adapter_name="second"),
    ):
        with refused(error, WEIGHTS):
            load()
    assert str(base) == before
    assert list(model.peft_config) == ["default"]


def test_a_directory_without_config_is_refused(saved):
    saved.joinpath("adapter_config.json").unlink()
    for load in (lambda: PeftModel.from_pretrained(tiny_vit(), saved), lambda: AutoPeftModel.from_pretrained(saved)):
        with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
            load()
    with pytest.raises((ValueError, OSError)):
        AutoModelForImageClassification.from_pretrained(saved)
