"""PGNConfig: impossible values are refused by name, what is left out is filled in, and JSON keeps all of it."""

import pytest
from conftest import PIXEL, edit_json, refused, tiny_config, tiny_vit
from peft import PeftConfig, get_peft_model

from pgn_peft import PGNConfig
from pgn_peft.tuner.resolve import resolve
from pgn_peft.version import __version__


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("num_virtual_tokens", 0, ValueError),
        ("num_virtual_tokens", "7", TypeError),
        ("library_size", -3, ValueError),
        ("library_size", 10**30, ValueError),
        ("prompt_depth", 0, ValueError),
        ("generator", "resnet18", ValueError),
        ("generator_image_size", 4, ValueError),
        ("generator_norm", "layer", ValueError),
        ("mixing", "sigmoid", ValueError),
        ("initializer_range", float("nan"), ValueError),
        ("mixing_init_std", -1, ValueError),
        ("prompt_dropout", 1, ValueError),
        ("head", "linear", ValueError),
        ("problem_type", "ranking", ValueError),
        ("id2label", {}, ValueError),
        ("id2label", ["cat", "dog"], TypeError),
        ("id2label", {0: "cat", 2: "dog"}, ValueError),
        ("target_modules", ["a", "b"], ValueError),
        ("task_type", "SEQ_CLS", ValueError),
    ],
)
def test_an_impossible_value_is_refused_by_name_and_value(field, value, error):
    shown = value if isinstance(value, (str, int, float)) else ""
    with refused(error, field, shown):
        get_peft_model(tiny_vit(), tiny_config(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, (2, 3)),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, ("single_label",)),
        ({"generator": "static", "static_prompts": True}, ("static_prompts",)),
        ({"generator": "static", "prompt_dropout": 0.5}, ("prompt_dropout",)),
        ({"id2label": {0: "cat", 1: "d\udc80g"}}, ("surrogates",)),  # a name that no file can hold
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, words):
    with refused(ValueError, *words):
        get_peft_model(tiny_vit(), tiny_config(**fields))


def test_what_is_left_out_follows_from_what_is_given():
    def resolved(**fields):
        return resolve(PGNConfig(**fields), tiny_vit())

    assert (resolved().static_prompts, resolved().mixing_init_std) == (True, 4.0)
    assert resolved(generator="static").static_prompts is False
    assert (resolved().prompt_depth, resolved().prompt_dropout, resolved().accumulate_prompts) == (2, 0.5, True)
    first = resolved(prompt_depth=1)
    assert (first.prompt_depth, first.prompt_dropout, first.accumulate_prompts) == (1, 0.0, False)
    for fields in ({"prompt_layout": "append"}, PIXEL, {"head": "text", "num_labels": 2}):
        model = tiny_vit("CLIPVisionModelWithProjection") if "head" in fields else tiny_vit()
        assert resolve(PGNConfig(**fields), model).prompt_depth == 1
    assert resolved(generator="static", prompt_depth="all").prompt_dropout == 0.0
    assert resolved(prompt_depth="all", prompt_dropout=0).prompt_dropout == 0
    official = resolved(static_prompts=False, mixing_init_std=0)
    assert (official.static_prompts, official.mixing_init_std) == (False, 0)


def test_json_round_trip(tmp_path):
    config = PGNConfig(
        num_virtual_tokens=7,
        library_size=9,
        generator_image_size=64,
        generator_norm="group",
        generator_rank=8,
        static_prompts=True,
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
    edit_json(tmp_path / "adapter_config.json", prompt_colour="green")
    with pytest.warns(UserWarning, match="prompt_colour"):
        assert PGNConfig.from_pretrained(tmp_path).library_size == 9
    edit_json(tmp_path / "adapter_config.json", library_size="many")
    with refused(TypeError, "library_size", "many"):
        PGNConfig.from_pretrained(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PGNConfig.from_pretrained(str(tmp_path))
