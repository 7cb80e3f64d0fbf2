"""Adapters of other versions: those of older ones give what they gave, those of newer ones are read or refused."""

import warnings

import pytest
import torch
from conftest import answer, assert_same, edit_json, move_adapter, tiny_config, tiny_vit
from make_golden import ADAPTERS, GOLDEN, golden_images
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import ViTForImageClassification

import pgn_peft
from pgn_peft import PGNConfig


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_of_version_0_1_still_gives_what_it_gave(name):
    base = ViTForImageClassification.from_pretrained(GOLDEN / "base")
    model = PeftModel.from_pretrained(base, GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    # A level of a pixel in 8 bits may round the other way on another machine.
    torch.testing.assert_close(answer(model, golden_images()), expected, atol=5e-3, rtol=1e-3)
    assert expected.std() > 0.1
    assert list(model.config.id2label.values()) == list(ADAPTERS[name]["id2label"].values())
    config = model.peft_config["default"]
    assert config.pgn_peft_version == "0.1.0"
    for field, value in ADAPTERS[name].items():
        if value is not None:
            assert getattr(config, field) == value, field


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and what it answers."""
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(num_labels=2))).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tiny_vit().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", answer(model, golden_images())


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    edit_json(file, **fields)


LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_vit(), folder),
    "AutoPeftModel": lambda folder: AutoPeftModel.from_pretrained(folder),
    "Transformers": lambda folder: _load_adapter(tiny_vit(), folder),
}


def _load_adapter(model, folder):
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize(
    ("loader", "off"),
    [("PeftModel", None), ("PeftModel", 0), ("PeftModel", []), ("AutoPeftModel", False), ("Transformers", "")],
)
def test_a_newer_field_that_is_off_is_left_out_with_a_warning(loader, off, saved):
    folder, expected = saved
    edit(folder, pgn_peft_version="9.1", temperature=off)
    with pytest.warns(UserWarning, match=f"Leaving out `temperature`.*by pgn_peft 9.1, newer.*{pgn_peft.__version__}"):
        model = LOADERS[loader](folder)
    assert_same(answer(model, golden_images()), expected)


@pytest.mark.parametrize(
    ("loader", "field", "value", "message"),
    [
        ("PeftModel", "temperature", 0.5, "`temperature` must be off in this version .*, but got 0.5"),
        ("AutoPeftModel", "generator", "vit-tiny", "`generator` must be one of resnet10, .*, but got 'vit-tiny'"),
        ("Transformers", "mixing", "top-8", "`mixing` must be one of softmax, sigmoid, but got 'top-8'"),
        ("PeftModel", "prompt_space", "depth", "`prompt_space` must be one of latent, pixel, but got 'depth'"),
        ("AutoPeftModel", "num_virtual_tokens", "auto", "`num_virtual_tokens` must be an integer, but got 'auto'"),
    ],
)
def test_what_a_newer_version_means_otherwise_is_refused_and_the_version_named(loader, field, value, message, saved):
    folder, _ = saved
    edit(folder, pgn_peft_version="9.1", **{field: value})
    with pytest.raises(
        (ValueError, TypeError), match=f"{message}.*made by pgn_peft 9.1, newer.*pip install -U pgn-peft"
    ):
        LOADERS[loader](folder)


def test_weights_that_only_a_newer_version_understands_are_refused_and_the_version_named(saved):
    folder, _ = saved
    edit(folder, pgn_peft_version="9.1", library_size=7)
    with pytest.raises(ValueError, match="must hold the tensors of the adapter.*made by pgn_peft 9.1, newer"):
        PeftModel.from_pretrained(tiny_vit(), folder)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_newer_version_alone_is_no_reason_to_warn(load, saved):
    folder, expected = saved
    edit(folder, pgn_peft_version="9.1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pgn_peft")
        model = load(folder)
    assert_same(answer(model, golden_images()), expected)


def test_an_unknown_field_of_this_version_is_pefts_business(saved):
    folder, expected = saved
    edit(folder, added_by_a_later_peft=3)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'added_by_a_later_peft'"):
        model = PeftModel.from_pretrained(tiny_vit(), folder)
    assert_same(answer(model, golden_images()), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'librarysize'"):
        PGNConfig(librarysize=3)


@pytest.mark.parametrize(("version", "error"), [("latest", ValueError), (3, TypeError), ([], TypeError)])
def test_a_version_that_is_none_is_refused(version, error, saved):
    folder, _ = saved
    edit(folder, pgn_peft_version=version)
    with pytest.raises(error, match="`pgn_peft_version` must be a"):
        PeftConfig.from_pretrained(folder)
