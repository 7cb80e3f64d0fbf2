"""Libraries that start from training images."""

import pytest
import torch
from conftest import assert_same, tiny_config, tiny_vit
from peft import get_peft_model

from pgn_peft.training import start_library_from_images
from pgn_peft.tuner.adapters import find_layer

PIXELS = {"prompt_space": "pixel", "num_virtual_tokens": None, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def adapted(**fields):
    return get_peft_model(
        tiny_vit(), tiny_config(**(PIXELS | {"prompt_layout": "canvas", "library_size": 50} | fields))
    )


def patches_of(model):
    return find_layer(model).library("default").patches


def normalize(images):
    return (images - 0.5) / 0.25


def test_a_library_starts_as_patches_of_the_images():
    model = adapted()
    images = torch.rand(10, 3, 20, 12).clamp(0.02, 0.98)
    start_library_from_images(model, normalize(images))
    windows = images.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    for patch in patches_of(model):
        assert (windows - patch).flatten(1).abs().amax(1).min() < 1e-5
    assert len(patches_of(model).flatten(1).unique(dim=0)) > 40


def test_the_seed_chooses():
    model, images, found = adapted(), normalize(torch.rand(10, 3, 32, 32)), []
    for seed in (0, 0, 1):
        start_library_from_images(model, images, seed=seed)
        found.append(patches_of(model).clone())
    assert_same(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("fields", [{"prompt_layout": "dense"}, {"prompt_space": "latent", "prompt_layout": None}])
def test_libraries_that_start_by_themselves_are_refused(fields, pixel_values):
    with pytest.raises(ValueError, match="`adapter_name` must be an adapter with a library of patches"):
        start_library_from_images(adapted(**fields), pixel_values)


@pytest.mark.parametrize("shape", [(10, 3, 20, 6), (3, 32, 32), (2, 1, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    message = rf"`pixel_values` must have the axes .* but got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        start_library_from_images(adapted(), torch.zeros(shape))


def test_wrong_values_and_names_are_refused():
    with pytest.raises(ValueError, match="`pixel_values` must be normalised with .* but got pixels from 0 to 255"):
        start_library_from_images(adapted(), normalize(torch.tensor([0.0, 255.0]).repeat(1, 3, 32, 16)))
    with pytest.raises(ValueError, match="`pixel_values` must be normalised with .* but got none"):
        start_library_from_images(adapted(), torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="`adapter_name` must be one of the model's adapters"):
        start_library_from_images(adapted(), torch.zeros(1, 3, 32, 32), "other")
