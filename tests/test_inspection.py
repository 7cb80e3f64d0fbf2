"""What is got out of an adapted model is what the model computes with."""

import pytest
import torch
from conftest import answer, assert_nearly_equal, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from tiny_clip import two_towers

from pgn_peft.inspection import (
    attention_to_prompts,
    base_predictions,
    library_tokens,
    mixing_coefficients,
    shuffled_prompts,
    usage_by_class,
)
from pgn_peft.tuner.adapters import find_layer

PIXELS = {"prompt_space": "pixel", "prompt_layout": "additive", "num_virtual_tokens": None}
PIXELS |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def adapted(**overrides):
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(**overrides)))


def test_coefficients_mix_the_library_into_the_models_own_prompts(pixel_values):
    model = adapted(static_prompts=False).train()
    coefficients = mixing_coefficients(model, pixel_values, batch_size=3)
    assert coefficients.shape == (4, 3, 6)
    expected = find_layer(model.eval()).prompts("default", pixel_values)
    torch.testing.assert_close(coefficients @ library_tokens(model), expected)


def test_looking_leaves_modes_and_statistics_alone(pixel_values):
    model = adapted().train()
    model.get_base_model().classifier.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.get_base_model().config._attn_implementation
    mixing_coefficients(model, pixel_values)
    attention_to_prompts(model, pixel_values)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_base_model().config._attn_implementation == attention


def test_attention_is_a_share_for_each_layer_and_prompt():
    for size in (32, 48):
        shares = attention_to_prompts(adapted(), torch.randn(2, 3, size, size))
        assert shares.shape == (2, 2, 3)
        assert ((shares > 0) & (shares < 1)).all()
        assert (shares.sum(dim=-1) < 1).all()


def test_a_prompt_that_nothing_attends_to_has_no_share(pixel_values):
    # A prompt whose key is far away from every query: of three prompts, the one that stands out gets the attention.
    model = adapted(generator="static").eval()
    layer = model.get_base_model().vit.layers[0]
    library = find_layer(model).pgn_library["default"]
    with torch.no_grad():
        query = layer.attention.q_proj(layer.layernorm_before(find_layer(model)(pixel_values)))[:, 0].mean(0)
        wanted = torch.linalg.lstsq(layer.attention.k_proj.weight, query[:, None]).solution[:, 0]
        library.tokens[0], library.tokens[1] = 5 * wanted, -5 * wanted
    shares = attention_to_prompts(model, pixel_values)[:, 0]
    assert (shares[:, 0] > 2 * shares[:, 1]).all()


def test_attention_is_refused_where_no_token_is_cls_or_a_prompt(pixel_values):
    siglip = get_peft_model(tiny_vit("SiglipForImageClassification"), tiny_config())
    pixels = get_peft_model(tiny_vit(), tiny_config(**PIXELS))
    for model in (siglip, pixels):
        with pytest.raises(ValueError, match="Attention is measured from CLS to the prompts in latent space"):
            attention_to_prompts(model, pixel_values)


def test_the_library_in_pixel_space_is_patches():
    assert library_tokens(get_peft_model(tiny_vit(), tiny_config(**PIXELS))).shape == (6, 3, 8, 8)


def test_usage_is_averaged_over_the_images_of_a_class():
    coefficients = torch.rand(5, 3, 4)
    labels = torch.tensor([0, 2, 0, 2, 2])
    usage = usage_by_class(coefficients, labels, 3)
    torch.testing.assert_close(usage[0], coefficients[[0, 2]].mean(dim=(0, 1)))
    torch.testing.assert_close(usage[2], coefficients[[1, 3, 4]].mean(dim=(0, 1)))
    assert usage[1].eq(0).all()


def test_what_is_not_there_is_refused_by_name(pixel_values):
    with pytest.raises(ValueError, match="cats"):
        mixing_coefficients(adapted(), pixel_values, "cats")
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        library_tokens(tiny_vit())
    with pytest.raises(ValueError, match="'default' has static prompts"):
        mixing_coefficients(adapted(generator="static"), pixel_values)
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"Here \[\] are active"):
        attention_to_prompts(model, pixel_values)


def test_the_answer_is_the_same_before_and_after(pixel_values):
    model = adapted().eval()
    before = answer(model, pixel_values)
    attention_to_prompts(model, pixel_values)
    assert_nearly_equal(answer(model, pixel_values), before)


def test_attention_of_a_model_of_two_towers_is_that_of_its_image_tower(pixel_values):
    model = get_peft_model(two_towers(), tiny_config())
    shares = attention_to_prompts(model, pixel_values)
    assert shares.shape == (4, 2, 3)
    model.get_base_model().set_attn_implementation("eager")
    expected = model.get_image_features(pixel_values=pixel_values, output_attentions=True).attentions
    torch.testing.assert_close(shares[:, 1], expected[1][:, :, 0, -3:].mean(dim=1))


def test_attention_that_is_fixed_at_creation_is_refused_in_words(pixel_values):
    base = tiny_vit("Data2VecVisionForImageClassification", attn_implementation="sdpa")
    with pytest.raises(ValueError, match="does not return its attention, which is fixed as 'sdpa'"):
        attention_to_prompts(get_peft_model(base, tiny_config()), pixel_values)


def test_the_frozen_model_answers_by_itself_and_with_its_own_classes(pixel_values):
    base = tiny_vit(num_labels=5)
    expected, names = answer(base.eval(), pixel_values).softmax(-1), base.config.id2label
    model = move_adapter(get_peft_model(base, tiny_config(id2label={0: "cat", 1: "dog"}))).train()
    scores, found = base_predictions(model, pixel_values)
    torch.testing.assert_close(scores, expected)
    assert found == names
    assert model.training
    assert answer(model.eval(), pixel_values).shape == (4, 2)  # the adapter is still on


def test_a_model_without_classes_of_its_own_has_no_answer(pixel_values):
    with pytest.raises(ValueError, match="has no classes of its own"):
        base_predictions(get_peft_model(two_towers(), tiny_config()), pixel_values)
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        base_predictions(tiny_vit(), pixel_values)


@pytest.mark.parametrize("fields", [{}, {"prompt_depth": "all"}, PIXELS], ids=["latent", "every layer", "pixel"])
def test_each_image_gets_the_prompts_of_the_one_before_it(fields, pixel_values):
    model = adapted(**fields).eval()
    own = answer(model, pixel_values)
    with shuffled_prompts(model):
        found = torch.cat([answer(model, pixel_values[:3]), answer(model, pixel_values[3:])])  # batches do not matter
        generator, before = find_layer(model).generator("default"), pixel_values[[2, 0, 1]]
    assert_nearly_equal(answer(model, pixel_values), own)
    # The same by hand: the generator is shown other images than the backbone.
    hook = generator.register_forward_pre_hook(lambda module, inputs: (before,))
    torch.testing.assert_close(found[:3], answer(model, pixel_values[:3]))
    before = pixel_values[2:3]
    torch.testing.assert_close(found[3:], answer(model, pixel_values[3:]))
    hook.remove()
    with pytest.raises(ValueError, match="has static prompts"), shuffled_prompts(adapted(generator="static")):
        pass
