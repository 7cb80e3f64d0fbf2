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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pgn_peft import PGNConfig

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


def test_pickled_weights_are_not_read(saved, on_the_hub, tmp_path):
    saved.joinpath(WEIGHTS).unlink()
    with saved.joinpath("adapter_model.bin").open("wb") as file:
        pickle.dump({"weight": Bomb(tmp_path / "exploded")}, file)
    for load in (lambda: PeftModel.from_pretrained(tiny_vit(), saved), on_the_hub):
        with pytest.raises(pickle.UnpicklingError):  # torch reads no more of it than tensors
            load()
    # Transformers reads no pickle unless told to, and then no more of it than tensors.
    with pytest.raises(OSError, match=f"No such file.*{WEIGHTS}"):
        tiny_vit().load_adapter(str(saved))
    with pytest.raises(pickle.UnpicklingError):
        tiny_vit().load_adapter(str(saved), use_safetensors=False)
    assert not tmp_path.joinpath("exploded").exists()


@pytest.mark.parametrize("name", ["base_model.model.vit.layernorm.weight", "vit.layernorm.bias"])
def test_a_file_cannot_bring_weights_for_the_base(name, saved, on_the_hub):
    expected = tiny_vit().state_dict()
    edit_weights(saved, **{name: torch.full((32,), 7.0)})
    message = f"do not fit its configuration: {name.removeprefix('base_model.model.')} is not part of it"
    base = tiny_vit()
    for load in (lambda: PeftModel.from_pretrained(base, saved), on_the_hub):
        with pytest.raises(ValueError, match=message):
            load()
    model = get_peft_model(tiny_vit(), tiny_config(num_labels=2))
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
    for loaded in (base, model.unload()):
        for key, tensor in loaded.state_dict().items():
            assert "pgn_" in key or torch.equal(tensor, expected[key.replace("base_layer.", "")])


def test_a_saved_module_cannot_bring_weights_for_the_original(tmp_path):
    config = tiny_config(num_labels=2, modules_to_save=["vit.layernorm"])
    get_peft_model(tiny_vit(), config).save_pretrained(tmp_path)
    name = "base_model.model.vit.layernorm.original_module.weight"
    edit_weights(tmp_path, **{name: torch.full((32,), 7.0)})
    base = tiny_vit()
    with pytest.raises(ValueError, match="original_module.weight is not part of it"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.vit.layernorm.original_module.weight, tiny_vit().vit.layernorm.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"library_size": 10**9}, "`library_size` is 1000000000"),
        ({"generator_width": 1024}, "would have 1,252,316,532 numbers"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_taken(fields, message, saved, on_the_hub):
    edit_config(saved, **fields)
    base = tiny_vit(hidden_size=fields.get("hidden_size", 32), num_hidden_layers=0, intermediate_size=8)
    before = str(base)
    loaders = {
        "Transformers": lambda: base.load_adapter(str(saved)),
        "inject": lambda: inject_adapter_in_model(PeftConfig.from_pretrained(saved), base),
    }
    for load in loaders.values():
        with pytest.raises(ValueError, match=message):
            load()
    for load in (lambda: PeftModel.from_pretrained(base, saved), on_the_hub):
        with pytest.raises(ValueError, match=f"{message}|do not fit its configuration"):
            load()
    assert str(base) == before


def test_a_header_that_lies_about_sizes_is_refused(saved):
    content = saved.joinpath(WEIGHTS).read_bytes()
    saved.joinpath(WEIGHTS).write_bytes(content.replace(b'"shape":[6,32]', b'"shape":[9,99]'))
    with pytest.raises(SafetensorError, match="invalid shape, data type, or offset"):
        PeftModel.from_pretrained(tiny_vit(), saved)


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


@pytest.mark.parametrize("kind", ["directory", "text"])
def test_what_is_no_file_of_tensors_is_refused(kind, saved, tmp_path):
    file = saved / WEIGHTS
    file.unlink()
    secret = tmp_path / "secret.txt"
    secret.write_text("the user's own words", encoding="utf-8")
    {"directory": file.mkdir, "text": lambda: file.symlink_to(secret)}[kind]()
    with pytest.raises((OSError, SafetensorError)) as error:
        PeftModel.from_pretrained(tiny_vit(), saved)
    assert "own words" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model._orig_mod."])
def test_names_with_a_foreign_prefix_are_refused(saved, prefix, pixel_values):
    save_file({prefix + name: tensor for name, tensor in load_file(saved / WEIGHTS).items()}, saved / WEIGHTS)
    with pytest.raises(ValueError, match="do not fit its configuration: .* is not part of it"):
        PeftModel.from_pretrained(tiny_vit(), saved)
    assert_no_answer(saved, pixel_values)


@pytest.mark.parametrize("part", ["pgn_library", "running_mean"])
def test_an_adapter_of_which_transformers_finds_no_part_does_not_answer(saved, part, pixel_values):
    tensors = load_file(saved / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, saved / WEIGHTS)
    assert_no_answer(saved, pixel_values)


def assert_no_answer(saved, pixel_values):
    """Transformers reports names that it does not know or find, and goes on; the model then refuses to compute."""
    model = tiny_vit()
    model.load_adapter(str(saved))
    with pytest.raises(ValueError, match="was loaded from a file without all tensors"):
        answer(model, pixel_values)
