"""Parameter groups: each trainable parameter has the learning rate of its part and form."""

import pytest
from conftest import tiny_config, tiny_vit
from peft import get_peft_model

from pgn_peft.training import parameter_groups

NAMES = {0: "dark", 1: "bright"}


def adapted(**overrides):
    return get_peft_model(tiny_vit(), tiny_config(**({"id2label": NAMES} | overrides)))


def test_each_trainable_parameter_is_in_one_group_with_its_rate():
    model = adapted(modules_to_save=["vit.layernorm"])
    groups = parameter_groups(model, 1e-3, library_learning_rate=1e-2, head_learning_rate=1e-4, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for name, group in grouped:
        part = next((part for part in ("pgn_generator", "pgn_library", "pgn_head") if part in name), "other")
        assert group["name"] == part
        assert group["lr"] == {"pgn_generator": 1e-3, "pgn_library": 1e-2, "pgn_head": 1e-4, "other": 1e-3}[part]
        assert group["weight_decay"] == (0.1 if dict(model.named_parameters())[name].ndim > 1 else 0)


PIXELS = {"prompt_space": "pixel", "image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("fields", "library"),
    [
        ({"generator": "static"}, 1e-2),
        ({"prompt_depth": 2}, 3e-3),
        ({"prompt_depth": 2, "accumulate_prompts": False}, 1e-3),
        (PIXELS | {"prompt_layout": "additive", "num_virtual_tokens": None}, 3e-2),
    ],
)
def test_each_form_has_rates_that_suit_it(fields, library):
    model = adapted(**fields)
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, 1e-3)}
    expected = {"pgn_generator": 1e-3, "pgn_library": library, "pgn_head": 3e-3}
    assert rates == pytest.approx({part: rate for part, rate in expected.items() if part in rates})
    assert {"pgn_library", "pgn_head"} <= rates.keys()


def test_each_adapter_has_the_rates_of_its_form():
    model = adapted()
    model.add_adapter("deep", tiny_config(id2label=NAMES, prompt_depth=2, accumulate_prompts=False))
    model.add_adapter("other", tiny_config(id2label=NAMES))  # which is also how the last group is called
    for name, expected in {"default": 1e-2, "deep": 1e-3, "other": 1e-2}.items():
        model.set_adapter(name)
        (rate,) = {group["lr"] for group in parameter_groups(model, 1e-3) if group["name"] == "pgn_library"}
        assert rate == pytest.approx(expected)
