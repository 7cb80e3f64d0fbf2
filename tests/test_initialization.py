"""Libraries that start from training images."""

import pytest
import torch
from conftest import tiny_config, tiny_vit
from peft import get_peft_model
from tiny_clip import two_towers

from pgn_peft.training import start_library_from_images
from pgn_peft.tuner.adapters import find_layer

SCALE = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
ARCHITECTURES = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "CLIPVisionModelWithProjection",
    "SiglipForImageClassification",
    "IJepaForImageClassification",
    "DINOv3ViTModel",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "Aimv2VisionModel",
    "TimmWrapperForImageClassification",
]


def library_of(model):
    return find_layer(model).library("default")


def is_among(entries, candidates):
    """Whether each entry is one of the candidates."""
    return bool((torch.cdist(entries, candidates, compute_mode="donot_use_mm_for_euclid_dist").amin(1) < 1e-4).all())


def entering(model, module, pixel_values):
    """What a module of a model takes when it embeds images."""
    found = []
    hook = module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(pixel_values)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_start_as_tokens_of_patches(architecture, pixel_values):
    model = get_peft_model(tiny_vit(architecture), tiny_config(generator="static", num_virtual_tokens=8))
    start_library_from_images(model, pixel_values)
    embeddings = find_layer(model).base_layer
    with torch.no_grad():
        tokens = embeddings(pixel_values)
    tokens = (tokens[0] if isinstance(tokens, tuple) else tokens).flatten(1, -2)[:, -16:]
    entries = library_of(model).tokens
    assert is_among(entries, tokens.flatten(0, 1))
    assert len(entries.unique(dim=0)) == 8


def test_each_layer_has_the_tokens_that_enter_it(pixel_values):
    base = tiny_vit()
    tokens = [entering(base, layer, pixel_values)[:, 1:].flatten(0, 1) for layer in base.vit.layers]
    model = get_peft_model(base, tiny_config(prompt_depth=None)).train()
    before = library_of(model).slot_prompts.clone()
    start_library_from_images(model, pixel_values)
    library = library_of(model)
    for entries, candidates in zip(library.tokens, tokens, strict=True):
        assert is_among(entries, candidates)
    assert not is_among(library.tokens[1], tokens[0])
    assert torch.equal(library.slot_prompts, before)
    assert model.training


def test_a_model_of_two_towers_embeds_the_images_alone(pixel_values):
    model = get_peft_model(two_towers(), tiny_config())
    start_library_from_images(model, pixel_values)
    tokens = find_layer(model).base_layer(pixel_values)[:, 1:].flatten(0, 1)
    assert is_among(library_of(model).tokens, tokens)


def test_the_seed_chooses_and_images_of_another_size_do_too(pixel_values):
    model = get_peft_model(tiny_vit(), tiny_config())
    found = []
    for seed in (0, 0, 1):
        start_library_from_images(model, pixel_values, seed=seed)
        found.append(library_of(model).tokens.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    start_library_from_images(model, torch.randn(1, 3, 48, 8))  # six patches for six entries
    assert len(library_of(model).tokens.unique(dim=0)) == 6


def test_in_pixel_space_it_is_patches():
    config = tiny_config(
        prompt_space="pixel", num_virtual_tokens=None, library_size=50, prompt_layout="canvas", **SCALE
    )
    model = get_peft_model(tiny_vit(), config)
    images = torch.rand(10, 3, 20, 12).clamp(0.02, 0.98)
    start_library_from_images(model, (images - 0.5) / 0.25)
    windows = images.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    patches = library_of(model).patches
    assert is_among(patches.flatten(1), windows.flatten(1))
    assert len(patches.flatten(1).unique(dim=0)) > 40
    with pytest.raises(ValueError, match="`pixel_values` must be normalised with .* but got pixels from 5.1 to 249.9"):
        start_library_from_images(model, (images * 255 - 0.5) / 0.25)


def test_dense_prompts_start_at_zero(pixel_values):
    model = get_peft_model(tiny_vit(), tiny_config(prompt_space="pixel", num_virtual_tokens=None, **SCALE))
    start_library_from_images(model, pixel_values)
    assert not library_of(model).patches.any()


@pytest.mark.parametrize("shape", [(10, 3, 20, 6), (3, 32, 32), (0, 3, 32, 32), (2, 1, 32, 32)])
def test_wrong_images_are_refused(shape):
    model = get_peft_model(tiny_vit(), tiny_config())
    message = rf"`pixel_values` must have the axes .* but got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=message):
        start_library_from_images(model, torch.zeros(shape))
    with pytest.raises(ValueError, match="`adapter_name` must be one of the model's adapters"):
        start_library_from_images(model, torch.zeros(1, 3, 32, 32), "other")
