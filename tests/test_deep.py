"""Prompts in several layers: each layer has its own in place of the ones before, and nothing else changes."""

import copy

import pytest
import torch
from conftest import answer, assert_same, embed, layers_of, move_adapter, refused, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from transformers import ViTImageProcessor

from pgn_peft import make_prompter
from pgn_peft.tuner.adapters import prompt_layer

LAYERS = 4


def adapted(architecture="ViTForImageClassification", **overrides):
    base = tiny_vit(architecture, num_hidden_layers=LAYERS)
    return move_adapter(get_peft_model(base, tiny_config(**({"prompt_depth": "all"} | overrides)))).eval()


def norm_before_layers(model):
    """What CLIP does to its tokens before the first layer, and to all prompts with them; others do nothing."""
    return next((part for name, part in model.named_modules() if name.endswith("pre_layrnorm")), torch.nn.Identity())


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def prompts_by_layer(model, pixel_values):
    """(B, depth, P, D), taken apart."""
    prompts = prompt_layer(model).prompts("default", pixel_values).detach()
    return prompts.unflatten(1, (-1, model.peft_config["default"].num_virtual_tokens))


@pytest.mark.parametrize(
    ("architecture", "depth", "form"),
    [
        ("ViTForImageClassification", 2, {}),
        ("ViTForImageClassification", LAYERS, {"static_prompts": False}),
        ("ViTForImageClassification", 3, {"generator": "static", "accumulate_prompts": False}),
        ("ViTForImageClassification", LAYERS, {"accumulate_prompts": False}),
        ("CLIPVisionModelWithProjection", LAYERS, {}),
        ("TimmWrapperForImageClassification", 2, {"generator": "static"}),
        ("BeitForImageClassification", 3, {}),
    ],
)
def test_each_layer_sees_its_own_prompts(architecture, depth, form, pixel_values):
    model = adapted(architecture, prompt_depth=depth, **form)
    prompts = prompts_by_layer(model, pixel_values)
    assert prompts.shape == (4, depth, 3, 32)
    seen, made = [], []
    for layer in layers_of(model):
        plain = getattr(layer, "base_layer", layer)
        plain.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        plain.register_forward_hook(lambda module, args, output: made.append(first_of(output)))
    answer(model, pixel_values)
    with model.disable_adapter():
        patches = embed(model, pixel_values).shape[1]
    assert [tokens.shape[1] for tokens in seen] == [patches + 3] * LAYERS
    prompts = norm_before_layers(model)(prompts)
    for index in range(depth):
        before = made[index - 1][:, patches:] if index and form.get("accumulate_prompts", True) else 0
        assert_same(seen[index][:, patches:], prompts[:, index] + before)
    if depth < LAYERS:  # from there on they stay, as prompts of the first layer do otherwise
        assert not torch.equal(seen[depth][:, patches:], prompts[:, depth - 1])


def test_static_ones_in_all_layers_are_vpt_deep(pixel_values):
    model = adapted(generator="static", head="frozen", accumulate_prompts=False)
    tokens = prompts_by_layer(model, pixel_values)[0]
    plain = tiny_vit(num_hidden_layers=LAYERS)

    def put(prompts, first):
        def replace_last_tokens(module, args):
            own = args[0] if first else args[0][:, : -len(prompts)]
            return (torch.cat([own, prompts.expand(len(own), -1, -1)], dim=1), *args[1:])

        return replace_last_tokens

    for index, layer in enumerate(layers_of(plain)):
        layer.register_forward_pre_hook(put(tokens[index], first=index == 0))
    assert_same(answer(model, pixel_values), answer(plain, pixel_values))


def test_mixtures_of_a_layer_are_mixed_from_its_own_library(pixel_values):
    model = adapted()
    layer = prompt_layer(model)
    library, coefficients = layer.library("default"), layer.generator("default")(pixel_values)
    assert library.tokens.shape == (LAYERS, 6, 32)
    assert library.slot_prompts.shape == (LAYERS, 3, 32)
    expected = torch.stack(
        [coefficients @ tokens + slots for tokens, slots in zip(library.tokens, library.slot_prompts, strict=True)],
        dim=1,
    )
    assert_same(prompts_by_layer(model, pixel_values), expected.detach())


def test_prompts_that_accumulate_start_as_prompts_of_the_first_layer(pixel_values):
    """Random prompts in every layer hide the image from CLS: trained on few images, such an adapter collapsed."""
    models = [
        get_peft_model(tiny_vit(num_hidden_layers=LAYERS), tiny_config(prompt_depth=depth, head="frozen")).eval()
        for depth in ("all", 1)
    ]
    libraries = [prompt_layer(model).library("default") for model in models]
    for name in ("tokens", "slot_prompts"):
        every, first = (getattr(library, name) for library in libraries)
        assert (every[1:] == 0).all()
        with torch.no_grad():
            every[0].copy_(first)
    generators = [prompt_layer(model).generator("default") for model in models]
    generators[0].load_state_dict(generators[1].state_dict())
    assert_same(answer(models[0], pixel_values), answer(models[1], pixel_values))


def test_a_depth_of_one_adds_no_dimension_and_no_wrappers():
    model = adapted(prompt_depth=1)
    assert not any(hasattr(layer, "base_layer") for layer in layers_of(model))
    assert prompt_layer(model).library("default").tokens.shape == (6, 32)


def test_hidden_states_and_attentions_have_the_tokens_of_a_layer(pixel_values):
    model = adapted()
    model.get_base_model().set_attn_implementation("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(4, 20, 32)}
    assert {tuple(weights.shape) for weights in outputs.attentions} == {(4, 2, 20, 20)}
    assert len(outputs.hidden_states) == LAYERS + 1


def test_it_lives_beside_shallow_adapters(pixel_values, tmp_path):
    deep, shallow = adapted(), adapted(prompt_depth=1)
    expected = {"deep": answer(deep, pixel_values), "shallow": answer(shallow, pixel_values)}
    deep.save_pretrained(tmp_path / "deep")
    shallow.save_pretrained(tmp_path / "shallow")
    for first, second in (("deep", "shallow"), ("shallow", "deep")):
        base = tiny_vit(num_hidden_layers=LAYERS)
        plain = answer(base, pixel_values)
        model = PeftModel.from_pretrained(base, tmp_path / first, adapter_name=first)
        model.load_adapter(tmp_path / second, adapter_name=second)
        for name in (first, second, first):
            model.set_adapter(name)
            assert_same(answer(model, pixel_values), expected[name])
        assert_same(answer(copy.deepcopy(model), pixel_values), expected[first])
        with model.disable_adapter():
            assert torch.equal(answer(model, pixel_values), plain)
        with pytest.warns(UserWarning, match="which is now deleted"):
            model.delete_adapter(first)
        assert_same(answer(model, pixel_values), expected[second])
        model.delete_adapter(second)
        assert torch.equal(answer(base, pixel_values), plain)
        unloaded = model.unload()
        assert torch.equal(answer(unloaded, pixel_values), plain)
        assert not any("pgn" in type(module).__module__ for module in unloaded.modules())


def test_it_is_active_alone(pixel_values):
    model = adapted()
    model.add_adapter("other", tiny_config())
    with refused(ValueError, "default"):
        model.base_model.set_adapter(["other", "default"])
    # Transformers' own methods do not ask the tuner.
    base = model.get_base_model()
    for layer in (base.vit.embeddings, base.classifier):
        layer.set_adapter(["default", "other"])
    with refused(ValueError, "default", "other"):
        model(pixel_values)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt_depth": 1, "accumulate_prompts": True}, "accumulate_prompts"),
        ({"prompt_depth": LAYERS + 1}, "4"),  # more layers than there are
        ({"prompt_depth": 2, "modules_to_save": ["layernorm_before"]}, "modules_to_save"),
        ({"prompt_depth": "all", "prompt_layout": "append"}, "prompt_depth"),
        ({"prompt_depth": 2, "prompt_space": "pixel", "image_mean": [0.5], "image_std": [0.5]}, "prompt_depth"),
    ],
)
def test_depths_that_cannot_be_are_refused_and_leave_the_model_alone(fields, word):
    base = tiny_vit(num_hidden_layers=LAYERS)
    with refused(ValueError, word):
        get_peft_model(base, tiny_config(**fields))
    assert not any("pgn" in type(module).__module__ for module in base.modules())


def test_a_look_alike_without_a_list_of_layers_is_refused():
    base = tiny_vit(num_hidden_layers=2)
    base.config.num_hidden_layers = 3
    with refused(ValueError, "prompt_depth"):
        get_peft_model(base, tiny_config(prompt_depth=2))


def test_modules_to_save_lie_outside_of_the_layers(pixel_values):
    get_peft_model(tiny_vit(), tiny_config(prompt_depth=2, modules_to_save=["vit.layernorm"]))
    model = get_peft_model(tiny_vit(), tiny_config(modules_to_save=["layers.0.layernorm_before"]))
    with refused(ValueError, "modules_to_save"):
        model.add_adapter("deep", tiny_config(prompt_depth=2))


def test_they_do_not_become_pixels():
    model = adapted(num_virtual_tokens=4)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    with refused(ValueError, "prompt_depth", 4):
        make_prompter(model, processor, in_range=False)
