"""Prompts in several layers: each layer has its own in place of the ones before, and nothing else changes."""

import copy

import pytest
import torch
from conftest import (
    REPRESENTATIVE_CLASSIFIERS,
    REPRESENTATIVES,
    answer,
    assert_same,
    embed,
    layers_of,
    move_adapter,
    tiny_config,
    tiny_vit,
    widen_biases,
)
from methods import VPTDeep
from peft import PeftModel, get_peft_model
from transformers import ViTImageProcessor

from pgn_peft import make_prompter
from pgn_peft.training import parameter_groups
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.encoder_layer import PGNBlock

LAYERS = 4


def adapted(architecture="ViTForImageClassification", **overrides):
    base = tiny_vit(architecture, num_hidden_layers=LAYERS)
    return move_adapter(get_peft_model(base, tiny_config(**({"prompt_depth": None} | overrides)))).eval()


def backbone_of(model):
    return model.get_base_model().base_model


def norm_before_layers(model):
    """What CLIP does to its tokens before the first layer, and to all prompts with them; others do nothing."""
    return next((part for name, part in model.named_modules() if name.endswith("pre_layrnorm")), torch.nn.Identity())


def prompts_by_layer(model, pixel_values):
    """(B, depth, P, D), taken apart."""
    layer = prompt_layer(model)
    return (
        layer.prompts("default", pixel_values).detach().unflatten(1, (-1, layer.configs["default"].num_virtual_tokens))
    )


@pytest.mark.parametrize("architecture", REPRESENTATIVES)
@pytest.mark.parametrize(("depth", "form"), [(2, {}), (LAYERS, {"slot_prompts": False}), (3, {"generator": "static"})])
def test_each_layer_sees_its_own_prompts(architecture, depth, form, pixel_values):
    model = adapted(architecture, prompt_depth=depth, **form)
    prompts = prompts_by_layer(model, pixel_values)
    assert prompts.shape == (4, depth, 3, 32)
    seen = []
    for layer in layers_of(model):
        getattr(layer, "base_layer", layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    answer(model, pixel_values)
    with model.disable_adapter():
        patches = embed(model, pixel_values).shape[1]
    assert [tokens.shape[1] for tokens in seen] == [patches + 3] * LAYERS
    prompts = norm_before_layers(model)(prompts)
    for index in range(depth):
        torch.testing.assert_close(seen[index][:, patches:], prompts[:, index], rtol=0, atol=1e-6)
    if depth < LAYERS:  # from there on they stay, as prompts of the first layer do otherwise
        assert not torch.equal(seen[depth][:, patches:], prompts[:, depth - 1])


@pytest.mark.parametrize("architecture", REPRESENTATIVE_CLASSIFIERS)
def test_static_ones_in_all_layers_are_vpt_deep(architecture, pixel_values):
    model = adapted(architecture, generator="static", head="frozen")
    plain = tiny_vit(architecture, num_hidden_layers=LAYERS)
    # VPT-deep as the benchmarks have it, written by itself.
    if not hasattr(plain.config, "hidden_size"):
        plain.config.hidden_size = 32
    reference = VPTDeep(plain, 3)
    widen_biases(plain, 3)
    prompts = norm_before_layers(plain)(prompt_layer(model).pgn_library["default"].tokens)
    reference.prompts.data = prompts.detach()
    torch.testing.assert_close(
        answer(model, pixel_values), answer(reference, pixel_values=pixel_values), rtol=0, atol=1e-6
    )


def test_mixtures_of_a_layer_are_mixed_from_its_own_library(pixel_values):
    model = adapted()
    layer = prompt_layer(model)
    library, coefficients = layer.pgn_library["default"], layer.pgn_generator["default"](pixel_values)
    assert library.tokens.shape == (LAYERS, 6, 32)
    assert library.slot_prompts.shape == (LAYERS, 3, 32)
    expected = torch.stack(
        [coefficients @ tokens + slots for tokens, slots in zip(library.tokens, library.slot_prompts, strict=True)],
        dim=1,
    )
    torch.testing.assert_close(prompts_by_layer(model, pixel_values), expected.detach())


def test_a_depth_of_one_is_what_it_was(pixel_values):
    model = adapted(prompt_depth=1)
    assert not any(isinstance(module, PGNBlock) for module in model.modules())
    assert prompt_layer(model).pgn_library["default"].tokens.shape == (6, 32)


def test_hidden_states_and_attentions_have_the_tokens_of_a_layer(pixel_values):
    model = adapted()
    model.get_base_model().set_attn_implementation("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(4, 20, 32)}
    assert {tuple(weights.shape) for weights in outputs.attentions} == {(4, 2, 20, 20)}
    assert len(outputs.hidden_states) == LAYERS + 1


def test_layers_that_answer_with_a_tuple(pixel_values):
    class InTuple(torch.nn.Module):
        def forward(self, hidden_states, factor):
            return hidden_states * factor, "attention"

    layer = prompt_layer(adapted(prompt_depth=2))
    tokens = torch.randn(2, 5 + 2 * 3, 32)
    hidden_states, attention = PGNBlock(InTuple(), layer, index=0, ends=False)(tokens, factor=2)
    assert_same(hidden_states, torch.cat([2 * tokens[:, :5], tokens[:, 8:]], dim=1))
    assert attention == "attention"
    hidden_states, _ = PGNBlock(InTuple(), layer, index=1, ends=True)(tokens[:, :8], factor=2)
    assert_same(hidden_states, 2 * tokens[:, :5])


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


def test_a_copy_is_independent_of_its_original(pixel_values):
    model = adapted()
    twin = copy.deepcopy(model)
    expected = answer(model, pixel_values)
    move_adapter(twin, seed=5)
    twin.base_model.disable_adapter_layers()
    assert torch.equal(answer(model, pixel_values), expected)
    assert_same(answer(twin, pixel_values), answer(tiny_vit(num_hidden_layers=LAYERS), pixel_values))


def test_it_is_active_alone(pixel_values):
    model = adapted()
    model.add_adapter("other", tiny_config())
    with pytest.raises(ValueError, match="`adapter_name` must name no other adapter beside 'default', which has pro"):
        model.base_model.set_adapter(["other", "default"])
    # Transformers' own methods do not ask the tuner.
    base = model.get_base_model()
    for layer in (base.vit.embeddings, base.classifier):
        layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="got default, other: their prompts would take each other's place"):
        model(pixel_values)


def test_more_layers_than_there_are_is_refused():
    base = tiny_vit()
    with pytest.raises(ValueError, match="`prompt_depth` must be at most 2, the layers of this ViTForImage.* got 3"):
        get_peft_model(base, tiny_config(prompt_depth=3))
    assert not any("pgn" in type(module).__module__ for module in base.modules())


def test_pixels_come_before_the_first_layer_only():
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(ValueError, match="`prompt_depth` must be 1 with prompt_space='pixel'.* got 2. An image"):
        tiny_config(prompt_depth=2, prompt_space="pixel", **scale)
    with pytest.raises(ValueError, match="`prompt_depth` must be 1 with.* got None"):
        tiny_config(prompt_depth=None, prompt_layout="append")
    with pytest.raises(
        ValueError, match="`prompt_depth` must be 1 for an adapter that is to become pixels, but got 4"
    ):
        make_prompter(
            adapted(num_virtual_tokens=4), ViTImageProcessor(size={"height": 32, "width": 32}), in_range=False
        )


def test_modules_of_their_own_lie_outside_of_the_layers():
    base = tiny_vit()
    with pytest.raises(
        ValueError, match="`modules_to_save` must lie outside of the layers after which.* got 'vit.layers.0.lay"
    ):
        get_peft_model(base, tiny_config(prompt_depth=2, modules_to_save=["layernorm_before"]))
    get_peft_model(tiny_vit(), tiny_config(prompt_depth=2, modules_to_save=["vit.layernorm"]))
    model = get_peft_model(base, tiny_config(modules_to_save=["layers.0.layernorm_before"]))
    with pytest.raises(ValueError, match="`modules_to_save` must lie outside of the layers after which prompts"):
        model.add_adapter("deep", tiny_config(prompt_depth=2))


def test_its_rates_are_the_librarys(pixel_values):
    groups = parameter_groups(adapted(), 1e-3, library_learning_rate=1e-2, head_learning_rate=3e-3)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["pgn_library"] == 1e-2


def test_a_look_alike_without_a_list_of_layers_is_refused():
    base = tiny_vit(num_hidden_layers=2)
    base.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="`prompt_depth` must be 1 for a ViTForImageClassification, in which 0 lists"):
        get_peft_model(base, tiny_config(prompt_depth=2))
