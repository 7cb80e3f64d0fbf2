"""Adapters that are damaged, incomplete or made for another model are refused, and nothing is lost."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import answer, edit_json, move_adapter, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def model():
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(id2label={0: "cat", 1: "dog"}))).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A folder with an adapter, and the logits it should give."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"hidden_size": 64},
            "`hidden_size` must be 64, as in this ViTForImageClassification, but got 32: the adapter",
        ),
        (
            {"num_channels": 1},
            "`num_channels` must be 1, as in this ViTForImageClassification, but got 3: the adapter",
        ),
    ],
)
def test_an_adapter_made_for_another_model_is_refused(base, message, saved, pixel_values):
    other = tiny_vit(**base)
    before = str(other)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, saved)
    with pytest.raises(ValueError, match=message):
        other.load_adapter(str(saved))
    assert str(other) == before


def edit_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(tensors):
    del tensors[next(name for name in tensors if name.endswith("library.tokens"))]


def add(tensors):
    tensors["base_model.model.vit.embeddings.pgn_library.extra"] = torch.zeros(2)


def reshape(tensors):
    tensors["base_model.model.classifier.pgn_head.weight"] = torch.zeros(7, 32)


def poison(tensors):
    tensors["base_model.model.classifier.pgn_head.weight"][0, 0] = float("nan")


CHANGES = [
    (drop, "pgn_library.tokens is missing"),
    (add, "pgn_library.extra is not part of it"),
    (reshape, r"pgn_head.weight has the shape \(7, 32\) instead of \(2, 32\)"),
    (poison, "pgn_head.weight holds NaN or infinity"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_tampered_weights_are_refused_before_the_model_is_touched(change, message, saved, model, pixel_values):
    expected = answer(model, pixel_values)
    edit_weights(saved, change)
    base = tiny_vit()
    before = str(base)
    message = f"adapter_model.safetensors` must hold the tensors of the adapter .*{message}"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, adapter_name="second")
    assert str(base) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_tampered_tensors_are_refused_and_the_adapter_kept(change, message, saved, model, pixel_values):
    expected = answer(model, pixel_values)
    edit_weights(saved, change)
    message = message.replace("tokens", "default.tokens").replace("pgn_head", "pgn_head.default")
    with pytest.raises(ValueError, match=f"`state_dict` must hold the tensors .*{message}"):
        set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"generator_width": 8},
        {"generator_norm": "group"},
        {"generator": "static", "slot_prompts": False},
        {"slot_prompts": False},
        {"generator_rank": 2},
        {"library_size": 1_000_000},
        {"num_virtual_tokens": 65_536},
        {"num_labels": 4, "id2label": None},
        {"head": "frozen"},
        {"modules_to_save": ["vit.layernorm"]},
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused(change, saved):
    file = saved / "adapter_config.json"
    edit_json(file, **change)
    base = tiny_vit()
    before = str(base)
    with pytest.raises(ValueError, match=r"must hold the tensors of the adapter|must name modules that were saved"):
        PeftModel.from_pretrained(base, saved)
    assert str(base) == before


def test_a_failed_load_onto_an_existing_adapter_keeps_it(model, pixel_values, tmp_path):
    model.add_adapter("trained", tiny_config(num_labels=2))
    move_adapter(model, seed=4)
    model.set_adapter("trained")
    expected = answer(model, pixel_values)
    model.set_adapter("default")
    get_peft_model(tiny_vit(), tiny_config(num_labels=3)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`state_dict` must hold the tensors"):
        model.load_adapter(tmp_path / "other", adapter_name="trained")
    model.set_adapter("trained")
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize(
    ("made_for", "loaded_on"),
    [
        ("ViTForImageClassification", "DeiTForImageClassification"),
        ("ViTForImageClassification", "ViTMSNForImageClassification"),
        ("ViTForImageClassification", "ViTModel"),
        ("ViTModel", "ViTForImageClassification"),
    ],
)
def test_an_adapter_made_for_another_architecture_is_refused(made_for, loaded_on, tmp_path):
    get_peft_model(tiny_vit(made_for), tiny_config()).save_pretrained(tmp_path)
    base = tiny_vit(loaded_on)
    before = str(base)
    with pytest.raises(
        ValueError, match=f"`model` must be a {made_for}, which the adapter was made for, but got a {loaded_on}"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert str(base) == before


def test_transformers_own_loader_refuses_other_shapes(saved):
    edit_weights(saved, reshape)
    with pytest.raises((RuntimeError, ValueError), match="mismatch|with all tensors"):
        tiny_vit().load_adapter(str(saved))


def test_a_truncated_file_is_refused_before_the_model_is_touched(saved, model, pixel_values):
    file = saved / "adapter_model.safetensors"
    expected = answer(model, pixel_values)
    os.truncate(file, file.stat().st_size // 2)
    message = "adapter_model.safetensors` must be a complete safetensors file, but reading it failed.*again"
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, adapter_name="second")
    base = tiny_vit()
    before = str(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert str(base) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, pixel_values), expected)


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_missing_file_is_refused_before_the_model_is_touched(as_path, saved, model):
    saved.joinpath("adapter_model.safetensors").unlink()
    base = tiny_vit()
    before = str(base)
    for load in (
        lambda: PeftModel.from_pretrained(base, as_path(saved)),
        lambda: model.load_adapter(as_path(saved), adapter_name="second"),
    ):
        with pytest.raises(FileNotFoundError, match="must hold the adapter's weights, but got no adapter_model.safe"):
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


def test_a_config_with_fields_of_the_wrong_type_is_refused(saved):
    file = saved / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"num_virtual_tokens": "three"}), encoding="utf-8"
    )
    for load in (lambda: PeftModel.from_pretrained(tiny_vit(), saved), lambda: tiny_vit().load_adapter(str(saved))):
        with pytest.raises(TypeError, match="`num_virtual_tokens` must be an integer, but got 'three'"):
            load()
