"""Adapters from strangers: no file runs code, takes memory that it does not fill, or changes the base."""

import json
import os
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from conftest import answer, assert_nearly_equal, edit_json, move_adapter, tiny_config, tiny_vit
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from pgn_peft import PGNConfig, load_classifier

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter."""
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(num_labels=2))).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def on_the_hub(saved, tmp_path, monkeypatch):
    """Publish a folder: a function that answers with how to load what lies in `saved` now from a Hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish():
        repository = tmp_path / "cache/models--someone--adapter"
        shutil.rmtree(repository, ignore_errors=True)
        blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
        for folder in (blobs, snapshot, repository / "refs"):
            folder.mkdir(parents=True)
        repository.joinpath("refs/main").write_text("0" * 40, encoding="utf-8")
        for file in saved.iterdir():
            shutil.copy(file, blobs / file.name)
            snapshot.joinpath(file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
        return PeftModel.from_pretrained(tiny_vit(), "someone/adapter", cache_dir=tmp_path / "cache")

    return publish


def edit_config(folder, **fields):
    file = folder / "adapter_config.json"
    edit_json(file, **fields)


def edit_weights(folder, **tensors):
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder)  # as whoever exchanges weights on purpose would


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_adapter_from_the_hub_loads(saved, on_the_hub, pixel_values):
    expected = answer(PeftModel.from_pretrained(tiny_vit(), saved), pixel_values)
    assert_nearly_equal(answer(on_the_hub(), pixel_values), expected)


def test_pickled_weights_run_no_code(saved, tmp_path):
    saved.joinpath(WEIGHTS).unlink()
    with saved.joinpath("adapter_model.bin").open("wb") as file:
        pickle.dump({"weight": Bomb(tmp_path / "exploded")}, file)
    with pytest.raises(OSError, match="Pickled weights"):
        load_classifier(saved)
    # PEFT and Transformers read no more of a pickle than tensors.
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(tiny_vit(), saved)
    with pytest.raises(pickle.UnpicklingError):
        tiny_vit().load_adapter(str(saved), use_safetensors=False)
    assert not tmp_path.joinpath("exploded").exists()


@pytest.mark.parametrize("name", ["base_model.model.vit.layernorm.weight", "vit.layernorm.bias"])
def test_a_file_cannot_bring_weights_for_the_base(name, saved, on_the_hub):
    expected = tiny_vit().state_dict()
    edit_weights(saved, **{name: torch.full((32,), 7.0)})
    message = name.removeprefix("base_model.model.")
    base = tiny_vit()
    loaders = (lambda: PeftModel.from_pretrained(base, saved), on_the_hub, lambda: load_classifier(saved))
    for load in loaders:
        with pytest.raises(ValueError, match=message):
            load()
    model = get_peft_model(tiny_vit(), tiny_config(num_labels=2))
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
    unloaded = model.unload().state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in unloaded.items())
    assert torch.equal(base.vit.layernorm.weight, expected["vit.layernorm.weight"])


def test_a_saved_module_cannot_bring_weights_for_the_original(tmp_path):
    config = tiny_config(num_labels=2, modules_to_save=["vit.layernorm"])
    get_peft_model(tiny_vit(), config).save_pretrained(tmp_path)
    name = "base_model.model.vit.layernorm.original_module.weight"
    edit_weights(tmp_path, **{name: torch.full((32,), 7.0)})
    base = tiny_vit()
    with pytest.raises(ValueError, match="original_module.weight is not part of it"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.vit.layernorm.original_module.weight, tiny_vit().vit.layernorm.weight)


def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_taken(saved):
    for fields, message in (({"library_size": 10**9}, "library_size"), ({"library_size": 10**7}, "numbers")):
        edit_config(saved, **fields)
        base = tiny_vit()
        before = str(base)
        loaders = (
            lambda base=base: base.load_adapter(str(saved)),
            lambda base=base: inject_adapter_in_model(PeftConfig.from_pretrained(saved), base),
            lambda base=base: PeftModel.from_pretrained(base, saved),
        )
        for load in loaders:
            with pytest.raises(ValueError, match=message):
                load()
        assert str(base) == before


def test_no_module_is_imported_because_a_file_names_it(saved, tmp_path, monkeypatch):
    tmp_path.joinpath("planted.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(saved, auto_mapping={"base_model_class": "Model", "parent_library": "planted"})
    with pytest.raises(ValueError, match="'planted' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(saved)
    PeftModel.from_pretrained(tiny_vit(), saved)  # which needs no such import


def test_text_in_a_field_is_never_evaluated(saved, tmp_path):
    trick = f"__import__('os').mkdir({str(tmp_path / 'evaluated')!r})"
    config = json.loads(saved.joinpath("adapter_config.json").read_text(encoding="utf-8"))
    config |= {"prompt_space": "pixel", "static_prompts": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for field in (
        "generator",
        "generator_norm",
        "library_size",
        "target_modules",
        "image_mean",
        "label_mapping",
        "head",
    ):
        with pytest.raises((ValueError, TypeError), match="__import__"):
            inject_adapter_in_model(PGNConfig(**config | {field: trick}), tiny_vit())
    assert not tmp_path.joinpath("evaluated").exists()


def test_a_subfolder_lies_inside(saved):
    with pytest.raises(ValueError, match="subfolder"):
        load_classifier(saved, subfolder="../other")


@pytest.mark.parametrize("prefix", ["module.", "base_model.model._orig_mod."])
def test_names_with_a_foreign_prefix_are_refused(saved, prefix, pixel_values):
    save_file({prefix + name: tensor for name, tensor in load_file(saved / WEIGHTS).items()}, saved / WEIGHTS)
    edit_config(saved)
    with pytest.raises(
        ValueError, match=f"{prefix.removeprefix('base_model.model.')}base_model.model.* is not part of it"
    ):
        PeftModel.from_pretrained(tiny_vit(), saved)
    # Transformers reports names that it does not know, and goes on.
    model = tiny_vit()
    model.load_adapter(str(saved))
    with pytest.raises(ValueError, match="'default'.* without all tensors"):
        answer(model, pixel_values)


@pytest.mark.parametrize("part", ["pgn_library", "running_mean"])
def test_an_adapter_of_which_a_part_is_missing_does_not_answer(saved, part, pixel_values):
    tensors = load_file(saved / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, saved / WEIGHTS)
    model = tiny_vit()
    model.load_adapter(str(saved))
    with pytest.raises(ValueError, match="'default'.* without all tensors"):
        answer(model, pixel_values)
