"""PGNConfig: its checks name field, value and remedy, and it survives JSON."""

import json

import pytest
from conftest import edit_json
from peft import PeftConfig

from pgn_peft import PGNConfig
from pgn_peft.version import __version__


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("num_virtual_tokens", 0, ValueError),
        ("num_virtual_tokens", 2.0, TypeError),
        ("num_virtual_tokens", True, TypeError),
        ("num_virtual_tokens", "7", TypeError),
        ("library_size", -3, ValueError),
        ("prompt_depth", 0, ValueError),
        ("prompt_depth", "all", TypeError),
        ("library_size", "64", TypeError),
        ("generator", "resnet18", ValueError),
        ("generator", None, TypeError),
        ("generator_image_size", 4, ValueError),
        ("generator_image_size", 64.5, TypeError),
        ("generator_width", 2, ValueError),
        ("generator_norm", "layer", ValueError),
        ("generator_rank", 0, ValueError),
        ("generator_rank", 8.0, TypeError),
        ("slot_prompts", 1, TypeError),
        ("mixing", "relu", ValueError),
        ("initializer_range", 0, ValueError),
        ("initializer_range", float("nan"), ValueError),
        ("initializer_range", "small", TypeError),
        ("head", "linear", ValueError),
        ("num_labels", 0, ValueError),
        ("num_labels", "10", TypeError),
        ("problem_type", "ranking", ValueError),
        ("id2label", {}, ValueError),
        ("id2label", ["cat", "dog"], TypeError),
        ("id2label", {0: "cat", 2: "dog"}, ValueError),
        ("id2label", {0: "cat", "0": "dog"}, ValueError),
        ("id2label", {0: 1}, TypeError),
        ("id2label", {"cat": 0}, TypeError),
        ("id2label", {"cat": "0"}, TypeError),
        ("target_modules", ["a", "b"], ValueError),
        ("target_modules", 7, TypeError),
        ("modules_to_save", [3], TypeError),
        ("modules_to_save", ["classifier"], ValueError),
        ("modules_to_save", "vit.classifier", ValueError),
        ("task_type", "SEQ_CLS", ValueError),
        ("hidden_size", 0, ValueError),
        ("num_channels", 1.5, TypeError),
        ("library_size", 10**30, ValueError),
        ("generator_width", 10**7, ValueError),
        ("generator_image_size", 10**6, ValueError),
        ("initializer_range", 10**400, ValueError),
        ("initial_logit_std", -1, ValueError),
        ("initial_logit_std", "4", TypeError),
        ("prompt_dropout", 1, ValueError),
        ("prompt_dropout", -0.5, ValueError),
        ("prompt_dropout", "0.5", TypeError),
    ],
)
def test_impossible_value_is_refused_by_name_and_value(field, value, error):
    with pytest.raises(error, match=f"`{field}` must") as raised:
        PGNConfig(**{field: value})
    shown = next(iter(value), value) if isinstance(value, list) and field == "modules_to_save" else value
    if not isinstance(value, dict):
        assert repr(shown).strip("'\"").split(".")[-1] in str(raised.value)
    # What is wrong, then what to do about it.
    assert str(raised.value).count(". ") >= 1


def test_labels_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="`num_labels` must be the length of `id2label`, 2, but got 3"):
        PGNConfig(id2label={0: "a", 1: "b"}, num_labels=3)
    with pytest.raises(ValueError, match="`problem_type` must be 'regression' or"):
        PGNConfig(num_labels=1, problem_type="single_label_classification")


def test_a_field_assigned_later_is_checked_when_the_config_is_validated():
    config = PGNConfig()
    config.mixing = "max"
    with pytest.raises(ValueError, match="`mixing` must be one of softmax, sigmoid, but got 'max'"):
        config.validate()


def test_what_is_left_out_is_settled_by_what_is_given():
    assert (PGNConfig().slot_prompts, PGNConfig().initial_logit_std) == (True, 4.0)
    assert PGNConfig(generator="static").slot_prompts is False
    assert PGNConfig(mixing="sigmoid").initial_logit_std == 0.0
    assert (PGNConfig().prompt_dropout, PGNConfig(prompt_depth=None).prompt_dropout) == (0.0, 0.5)
    assert PGNConfig(generator="static", prompt_depth=None).prompt_dropout == 0.0
    assert PGNConfig(prompt_depth=None, prompt_dropout=0).prompt_dropout == 0
    official = PGNConfig(slot_prompts=False, initial_logit_std=0)
    assert (official.slot_prompts, official.initial_logit_std) == (False, 0)
    with pytest.raises(ValueError, match="`slot_prompts` must be False with generator='static', but got True"):
        PGNConfig(generator="static", slot_prompts=True)
    with pytest.raises(ValueError, match="`prompt_dropout` must be 0 with generator='static', but got 0.5"):
        PGNConfig(generator="static", prompt_dropout=0.5)


def test_json_round_trip(tmp_path):
    config = PGNConfig(
        num_virtual_tokens=7,
        library_size=9,
        generator_image_size=64,
        generator_norm="group",
        generator_rank=8,
        slot_prompts=True,
        mixing="sigmoid",
        id2label={1: "dog", 0: "cat"},
        modules_to_save=["layernorm"],
        target_modules="backbone.embeddings",
    )
    config.save_pretrained(tmp_path)
    for loaded in (PGNConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, PGNConfig)
        assert loaded == config
        assert loaded.id2label == {0: "cat", 1: "dog"}  # JSON has string keys only
    assert config.pgn_peft_version == __version__


def test_unknown_field_of_a_later_version_is_ignored_with_a_warning(tmp_path):
    PGNConfig(library_size=9).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    edit_json(file, prompt_colour="green")
    with pytest.warns(UserWarning, match="prompt_colour"):
        assert PGNConfig.from_pretrained(tmp_path).library_size == 9


def test_field_of_the_wrong_type_in_a_file_is_refused(tmp_path):
    PGNConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"library_size": "many"}), encoding="utf-8"
    )
    with pytest.raises(TypeError, match="`library_size` must be an integer, but got 'many'"):
        PGNConfig.from_pretrained(tmp_path)


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PGNConfig.from_pretrained(str(tmp_path))
