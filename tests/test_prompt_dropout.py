"""Prompt dropout: in training some images have the mean coefficients of their batch."""

import pytest
import torch
from conftest import answer, assert_nearly_equal, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model

from pgn_peft.tuner.adapters import find_layer

PIXELS = {
    "prompt_space": "pixel",
    "prompt_layout": "additive",
    "num_virtual_tokens": None,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def adapted(**fields):
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(prompt_dropout=0.5, generator_norm="group", **fields)))


@pytest.mark.parametrize("fields", [{}, {"prompt_depth": "all"}, PIXELS], ids=["latent", "every layer", "pixel"])
def test_about_half_of_the_images_have_the_mean_coefficients(fields):
    layer = find_layer(adapted(**fields).train())
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        coefficients = layer.generator("default")(images)
        library = layer.library("default")
        own, mean = library(coefficients), library(coefficients.mean(dim=0, keepdim=True))
        prompts = layer.prompts("default", images)
    has_mean = torch.tensor([torch.allclose(found, mean[0], atol=1e-5) for found in prompts])
    has_own = torch.tensor([torch.allclose(*pair, atol=1e-5) for pair in zip(prompts, own, strict=True)])
    assert torch.equal(has_mean, ~has_own)
    assert 16 < has_mean.sum() < 48


def test_gradients_reach_the_generator_through_both():
    model = adapted().train()
    model(torch.randn(8, 3, 32, 32), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    generator = find_layer(model).generator("default")
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.head.parameters())


def test_it_is_off_in_evaluation(pixel_values):
    with_it = adapted().eval()
    without = move_adapter(get_peft_model(tiny_vit(), tiny_config(generator_norm="group"))).eval()
    assert_nearly_equal(answer(with_it, pixel_values), answer(without, pixel_values))


def test_it_compiles_to_one_graph(pixel_values):
    model = adapted(problem_type="single_label_classification").train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(pixel_values=pixel_values, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
