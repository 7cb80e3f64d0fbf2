"""What people and tools do to the files of an adapter: edited configurations, rewritten weights, damaged files."""

import json
import warnings

import pytest
import torch
from conftest import answer, assert_nearly_equal, move_adapter, own_adapter_methods, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from pgn_peft import PGNConfig, load_classifier

NAMES = {0: "cat", 1: "dog", 2: "owl"}
PIXELS = {"prompt_space": "pixel", "num_virtual_tokens": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FORMS = {"first layer": {}, "every layer": {"prompt_depth": "all"}, "pixels": PIXELS}

LOADERS = {
    "PeftModel": lambda adapter, base: PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base), adapter
    ),
    "low_cpu_mem_usage": lambda adapter, base: PeftModel.from_pretrained(
        ViTForImageClassification.from_pretrained(base), adapter, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda adapter, base: AutoPeftModel.from_pretrained(adapter),
    "AutoModelForImageClassification": lambda adapter, base: AutoModelForImageClassification.from_pretrained(adapter),
    "load_classifier": lambda adapter, base: load_classifier(adapter).model,
}


def save(folder, **fields):
    """Save a base and an adapter with random weights, and return the adapter's folder and its model."""
    base = folder / "base"
    tiny_vit(num_labels=5).save_pretrained(base)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    model = get_peft_model(ViTForImageClassification.from_pretrained(base), tiny_config(id2label=NAMES, **fields))
    move_adapter(model).eval()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def edit(adapter, **fields):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def moved(adapter):
    """Move the base, and write the new place into the adapter's configuration."""
    (adapter.parent / "base").rename(adapter.parent / "elsewhere")
    edit(adapter, base_model_name_or_path=str(adapter.parent / "elsewhere"))


def with_windows_line_ends(adapter):
    """What git does to text files with core.autocrlf."""
    file = adapter / "adapter_config.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


EDITS = {
    "a moved base": moved,
    "a renamed label": lambda adapter: edit(adapter, id2label={"0": "tiger", "1": "dog", "2": "owl"}),
    "no number of labels": lambda adapter: edit(adapter, num_labels=None),
    "a revision": lambda adapter: edit(adapter, revision="main"),
    "an unknown key": lambda adapter: edit(adapter, written_by_another_tool={"a": 1}),
    "a checksum of an earlier version": lambda adapter: edit(adapter, checksums={"adapter_config.json": "0"}),
    "an image's task type": lambda adapter: edit(adapter, task_type="IMAGE_CLASSIFICATION"),
    "Windows line ends": with_windows_line_ends,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("change", EDITS)
def test_an_edited_configuration_loads(change, loader, pixel_values, tmp_path):
    adapter, model = save(tmp_path)
    EDITS[change](adapter)
    base = tmp_path / ("elsewhere" if change == "a moved base" else "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = LOADERS[loader](str(adapter), base)
    messages = {str(warning.message) for warning in caught}  # some loaders read a configuration twice
    assert len([message for message in messages if "gnor" in message]) <= 1  # "ignored", "Ignoring"
    assert_nearly_equal(answer(loaded.eval(), pixel_values), answer(model, pixel_values))
    assert loaded.config.id2label[0] == ("tiger" if change == "a renamed label" else "cat")


@pytest.mark.parametrize(
    ("field", "value"), [("library_size", 7), ("num_virtual_tokens", 4), ("generator_width", 8), ("num_labels", 4)]
)
def test_a_field_with_which_the_tensors_do_not_fit_is_named(field, value, tmp_path):
    adapter, _ = save(tmp_path)
    edit(adapter, **({"num_labels": 4, "id2label": None} if field == "num_labels" else {field: value}))
    with pytest.raises(RuntimeError, match=f"`{field}`"):
        LOADERS["PeftModel"](adapter, tmp_path / "base")


def half(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def bfloat16(tensors):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def with_counters(counter):
    """Add the counters of batches that earlier versions saved, as other tools leave them."""

    def rewrite(tensors):
        names = [name for name in tensors if name.endswith("running_mean")]
        return tensors | {name.replace("running_mean", "num_batches_tracked"): counter.clone() for name in names}

    return rewrite


REWRITES = {
    "half precision": (half, 2e-3),
    "bfloat16": (bfloat16, 2e-2),
    "a counter": (with_counters(torch.tensor(7)), 1e-5),
    "a counter in half precision": (with_counters(torch.tensor(7.0).half()), 1e-5),
    "an averaged counter": (with_counters(torch.tensor(6.5)), 1e-5),
    "a counter without a value": (with_counters(torch.zeros(0)), 1e-5),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("rewrite", REWRITES)
def test_rewritten_weights_load(rewrite, loader, pixel_values, tmp_path):
    function, tolerance = REWRITES[rewrite]
    adapter, model = save(tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file(function(load_file(file)), file)
    loaded = LOADERS[loader](str(adapter), tmp_path / "base").eval()
    expected = answer(model, pixel_values)
    torch.testing.assert_close(
        answer(loaded, pixel_values), expected, rtol=0, atol=tolerance * expected.abs().max().item() + 1e-5
    )
    dtypes = {tensor.dtype for name, tensor in loaded.named_parameters() if "pgn_" in name}
    assert dtypes == {torch.float32}, "adapters compute in float32"


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def without_a_tensor(file):
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("library.tokens"))]
    save_file(tensors, file)


def with_nan(file):
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("library.tokens")).fill_(torch.nan)
    save_file(tensors, file)


def of_another_shape(file):
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("library.tokens"))
    save_file(tensors | {name: tensors[name][1:].clone()}, file)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", [cut, without_a_tensor, with_nan, of_another_shape])
def test_damaged_weights_are_refused(damage, loader, pixel_values, tmp_path):
    adapter, _ = save(tmp_path)
    damage(adapter / "adapter_model.safetensors")
    with pytest.raises(Exception) as caught:  # noqa: PT011  (safetensors, torch and Transformers have their own)
        answer(LOADERS[loader](str(adapter), tmp_path / "base"), pixel_values)
    assert type(caught.value).__name__ in ("ValueError", "RuntimeError", "SafetensorError", "OSError")


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("ViTModel", {}), ("DeiTForImageClassification", {}), ("ViTForImageClassification", {"hidden_size": 16})],
)
def test_an_adapter_made_for_another_model_is_refused(architecture, sizes, tmp_path):
    adapter, _ = save(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="embeddings"):
        PeftModel.from_pretrained(tiny_vit(architecture, **sizes), adapter)


@pytest.mark.parametrize("config_class", [PGNConfig, PeftConfig])
def test_a_configuration_loads_without_weights(config_class, tmp_path):
    adapter, model = save(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    config = config_class.from_pretrained(str(adapter))
    assert config.id2label == NAMES
    assert config.library_size == model.peft_config["default"].library_size


def test_names_of_earlier_fields_are_read():
    config = PGNConfig(slot_prompts=False, initial_logit_std=0.5, prompt_layout="dense", image_offset=True)
    assert (config.static_prompts, config.mixing_init_std, config.prompt_layout) == (False, 0.5, "additive")


def test_a_layout_that_was_removed_is_refused_by_name():
    config = tiny_config(**PIXELS, prompt_layout="canvas")
    with pytest.raises(ValueError, match="'canvas'.*'additive'"):
        get_peft_model(tiny_vit(), config)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_is_refused_when_it_is_saved(form, tmp_path):
    model = get_peft_model(tiny_vit(), tiny_config(**FORMS[form]))
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_a_state_dict_of_other_names_is_refused_when_it_is_saved(tmp_path):
    """As `accelerator.get_state_dict` returns it for a compiled model."""
    model = get_peft_model(tiny_vit(), tiny_config(num_labels=3))
    weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="No tensor was written"):
        model.save_pretrained(tmp_path, state_dict=weights)


# Manners towards PEFT's users.


def test_the_configuration_is_the_object_that_was_passed(tmp_path):
    config = tiny_config()
    model = get_peft_model(tiny_vit(), config)
    assert model.peft_config["default"] is config
    assert config.hidden_size == 32


def test_one_configuration_serves_several_models():
    config = tiny_config(prompt_depth="all")
    get_peft_model(tiny_vit(num_labels=3), config)
    second = get_peft_model(tiny_vit(num_labels=7, num_hidden_layers=3), config)
    assert (config.num_labels, config.prompt_depth) == (7, 3)
    assert second.config.num_labels == 7


def test_the_image_recipe_of_peft_works(pixel_values):
    with pytest.warns(UserWarning, match="classifier"):
        model = get_peft_model(tiny_vit(), tiny_config(modules_to_save=["classifier"], num_labels=3))
    with pytest.warns(UserWarning, match="IMAGE_CLASSIFICATION"):
        other = get_peft_model(tiny_vit(), tiny_config(task_type="IMAGE_CLASSIFICATION", num_labels=3))
    assert answer(model, pixel_values).shape == answer(other, pixel_values).shape == (4, 3)
    with pytest.raises(ValueError, match="SEQ_CLS"):
        tiny_config(task_type="SEQ_CLS")


@pytest.mark.parametrize("name", ["0", "12", "my adapter", "vit-2", "layer", "weights", "café"])
def test_names_that_peft_takes_are_taken(name, pixel_values, tmp_path):
    model = get_peft_model(tiny_vit(), tiny_config(num_labels=3), adapter_name="other")
    model.add_adapter(name, tiny_config(num_labels=3))
    move_adapter(model).eval()
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / name)
    assert_nearly_equal(answer(loaded.eval(), pixel_values), answer(model, pixel_values))


@pytest.mark.parametrize("name", ["embeddings", "trunk", "__base__", "a.b", "keys", ""])
def test_a_name_that_clashes_is_refused_before_the_model_is_changed(name):
    model = tiny_vit()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="cannot be called"):
        get_peft_model(model, tiny_config(), adapter_name=name)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("head_size", [3, 5])
def test_classes_that_are_named_in_the_models_config_are_saved(when, head_size, tmp_path):
    """huggingface/peft#1486: LABEL_1 after loading."""
    model = tiny_vit(num_labels=head_size)

    def name_classes(config):
        config.id2label, config.label2id = dict(NAMES), {name: index for index, name in NAMES.items()}

    if when == "before":
        name_classes(model.config)
    adapted = get_peft_model(model, tiny_config(num_labels=3))
    if when == "after":
        name_classes(adapted.config)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(num_labels=head_size), tmp_path)
    assert loaded.config.id2label == NAMES


def test_weighted_adapters_are_refused_in_words():
    model = get_peft_model(tiny_vit(), tiny_config())
    with pytest.raises(ValueError, match="set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "mean")


def test_an_adapter_continues_with_more_classes(pixel_values, tmp_path):
    adapter, model = save(tmp_path)
    config = PGNConfig.from_pretrained(str(adapter))
    config.id2label, config.num_labels = NAMES | {3: "fox"}, None
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(
        base, adapter, config=config, is_trainable=True, ignore_mismatched_sizes=True
    ).eval()
    assert answer(loaded, pixel_values).shape == (4, 4)
    library = "base_model.model.vit.embeddings.pgn_library.default.tokens"
    assert torch.equal(loaded.state_dict()[library], model.state_dict()[library])


@own_adapter_methods
def test_transformers_own_methods_keep_the_object(tmp_path):
    model, config = tiny_vit(), tiny_config()
    model.add_adapter(config)
    assert model.peft_config["default"] is config
