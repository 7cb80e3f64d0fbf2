"""Adapters in pixel space: PEFT's contract, valid pixels, and what was trained is what is deployed."""

import pytest
import torch
from conftest import answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftModel, get_peft_model

from pgn_peft import PGNConfig
from pgn_peft.nn.library import PatchLibrary
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.layer import PGNLayer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Each layout with a generator and without one.
forms = pytest.mark.parametrize(
    ("layout", "generator"),
    [(layout, generator) for layout in ("canvas", "append", "dense") for generator in ("resnet10", "static")],
)


def pixel_config(**overrides):
    defaults = {"prompt_space": "pixel", "image_mean": MEAN, "image_std": STD, "num_virtual_tokens": None}
    return tiny_config(**(defaults | overrides))


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, PGNLayer))


@pytest.mark.parametrize(
    ("architecture", "layout", "generator"),
    [
        ("ViTForImageClassification", "canvas", "resnet10"),
        ("ViTForImageClassification", "append", "static"),
        ("DeiTForImageClassification", "append", "resnet10"),
        ("ViTMSNForImageClassification", "canvas", "static"),
        ("ViTModel", "append", "resnet10"),
        ("ViTForImageClassification", "dense", "resnet10"),
        ("Dinov2ForImageClassification", "dense", "static"),
    ],
)
def test_the_adapted_model_is_the_stock_model_on_the_prompted_image(architecture, layout, generator, pixel_values):
    base = tiny_vit(architecture)
    before = answer(base, pixel_values)
    model = get_peft_model(base, pixel_config(prompt_layout=layout, generator=generator, head="frozen"))
    move_adapter(model).eval()
    prompted = layer_of(model).prompted_images("default", pixel_values)
    assert prompted.shape[2:] == ((40, 32) if layout == "append" else (32, 32))
    expected = answer(model, pixel_values)
    found = answer(tiny_vit(architecture), prompted, interpolate_pos_encoding=layout == "append")
    torch.testing.assert_close(found, expected)
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)


@forms
def test_training_moves_the_whole_adapter_and_keeps_pixels_valid(layout, generator, pixel_values):
    # So large a step needs a gentle start.
    config = pixel_config(prompt_layout=layout, generator=generator, initial_logit_std=0)
    model = get_peft_model(tiny_vit(), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
    for _ in range(3):
        model(pixel_values, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    layer = layer_of(model)
    patches = layer.prompts("default", pixel_values)
    if layout != "dense":
        assert 0 <= patches.min() < 0.05
        assert 0.95 < patches.max() <= 1
    pixels = denormalize(pixel_values.clamp(-1.8, 2.2), MEAN, STD)
    prompted = denormalize(layer.prompted_images("default", normalize(pixels, MEAN, STD)), MEAN, STD)
    assert prompted.min() > -1e-5
    assert prompted.max() < 1 + 1e-5


@forms
def test_save_and_load_under_another_name(layout, generator, pixel_values, tmp_path):
    config = pixel_config(prompt_layout=layout, generator=generator, num_labels=3)
    model = move_adapter(get_peft_model(tiny_vit(), config)).eval()
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_vit(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert_same(answer(loaded, pixel_values), expected, valid_pixels=True)
    again = get_peft_model(tiny_vit(), tiny_config()).eval()
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert_same(answer(again, pixel_values), expected, valid_pixels=True)
    recorded = loaded.peft_config["other"]
    assert (recorded.image_size, recorded.patch_size, recorded.hidden_size) == (32, 8, 32)
    assert recorded.num_virtual_tokens == {"append": 4, "canvas": 12, "dense": 16}[layout]


def test_auto_peft_model_loads_it(pixel_values, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "vit")
    base = type(tiny_vit()).from_pretrained(tmp_path / "vit")
    model = move_adapter(get_peft_model(base, pixel_config())).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert_same(answer(loaded, pixel_values), answer(model, pixel_values), valid_pixels=True)


def test_unload_and_delete_leave_nothing(pixel_values):
    base = tiny_vit()
    before = answer(base, pixel_values)
    model = get_peft_model(base, pixel_config())
    model.add_adapter("latent", tiny_config())
    model.delete_adapter("default")
    layer = layer_of(model)
    assert list(layer.configs) == ["latent"]
    assert not layer.layouts
    assert torch.equal(answer(model.unload(), pixel_values), before)


def test_a_latent_adapter_beside_it_appends_to_the_prompted_image(pixel_values):
    model = get_peft_model(tiny_vit("ViTModel"), pixel_config())
    model.add_adapter("latent", tiny_config())
    move_adapter(model).eval()
    model.base_model.set_adapter(["default", "latent"])
    assert answer(model, pixel_values).shape == (4, 1 + 16 + 3, 32)


def test_two_adapters_in_pixel_space_at_once_are_refused(pixel_values):
    model = get_peft_model(tiny_vit(), pixel_config())
    model.add_adapter("second", pixel_config(prompt_layout="append"))
    with pytest.raises(ValueError, match="one adapter in pixel space at most, but got default, second"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("second")
    assert answer(model, pixel_values).shape == (4, 5)


def test_another_resolution_than_the_models_own(pixel_values):
    model = get_peft_model(tiny_vit(), pixel_config(image_size=48, prompt_layout="canvas")).eval()
    assert model.peft_config["default"].num_virtual_tokens == 6 * 6 - 4 * 4
    large = torch.nn.functional.interpolate(pixel_values, size=(48, 48))
    assert answer(model, large, interpolate_pos_encoding=True).shape == (4, 5)
    with pytest.raises(
        ValueError, match="`pixel_values` must measure 48 x 48 pixels, as the layout does, but got 32 x 32"
    ):
        answer(model, pixel_values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": None}, "`image_mean` must be given with prompt_space='pixel', but got None"),
        ({"image_std": None}, "`image_std` must be given with prompt_space='pixel', but got None"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"`image_std` must hold above 0 numbers, .* but got \[0.2, 0.0, 0.2\]"),
        ({"image_mean": [float("nan")] * 3}, "`image_mean` must hold finite numbers"),
        ({"slot_prompts": True}, "`slot_prompts` must be False with prompt_space='pixel', but got True"),
        (
            {"mixing": "sigmoid", "prompt_layout": "canvas"},
            "`mixing` must be 'softmax' with prompt_space='pixel', but got 'sigmoid'",
        ),
        ({"prompt_space": "pixels"}, "`prompt_space` must be one of latent, pixel, but got 'pixels'"),
        (
            {"prompt_layout": "dense", "image_offset": True},
            "`image_offset` must be left out with prompt_layout='dense', but got True",
        ),
        ({"prompt_layout": "dense", "generator_rank": 4}, "`generator_rank` must be left out with prompt_layout='d"),
        ({"prompt_layout": "below"}, "`prompt_layout` must be one of append, canvas, dense, but got 'below'"),
        ({"image_size": 4}, "`image_size` must lie in 8..16384, but got 4"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        pixel_config(**fields)


def test_a_mean_that_is_no_list_is_refused():
    with pytest.raises(TypeError, match="`image_mean` must be a list with a number for each channel, but got 0.5"):
        pixel_config(image_mean=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_virtual_tokens": 5, "prompt_layout": "canvas"},
            "`num_virtual_tokens` must fill .* but got 5. Use 4, 7, 8, 10, 12",
        ),
        (
            {"prompt_layout": "dense", "num_virtual_tokens": 12},
            "`num_virtual_tokens` must be 16 in the 'dense' layout, which has a prompt for each of the 4 x 4 patches",
        ),
        ({"image_size": 36}, "`image_size` must be whole patches of 8 pixels, but got 36 x 36"),
        (
            {"image_mean": [0.5], "image_std": [0.5]},
            "must have 3 numbers, one for each channel of the model, but got 1 and 1",
        ),
    ],
)
def test_configs_that_do_not_fit_the_model_are_refused_and_leave_it_alone(fields, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, pixel_config(**fields))
    assert not any("pgn" in name for name, _ in model.named_modules())


def test_one_channel(pixel_values):
    model = get_peft_model(tiny_vit(num_channels=1), pixel_config(image_mean=[0.5], image_std=[0.5])).eval()
    assert answer(model, pixel_values[:, :1]).shape == (4, 5)


def test_bfloat16(pixel_values):
    """No more is lost than the backbone loses by itself on the prompted image."""
    model = move_adapter(get_peft_model(tiny_vit(), pixel_config(head="frozen"))).eval()
    expected = answer(model, pixel_values)
    prompted = layer_of(model).prompted_images("default", pixel_values)
    lost = (answer(tiny_vit().bfloat16(), prompted.bfloat16()).float() - answer(tiny_vit(), prompted)).abs().max()
    found = answer(model.to(torch.bfloat16), pixel_values.bfloat16()).float()
    assert (found - expected).abs().max() < 3 * lost


def test_a_token_shift_moves_the_token_equally_in_every_direction():
    """Around grey, to first order: that is what the parameter is for."""
    model = get_peft_model(tiny_vit(), pixel_config(generator="static", prompt_layout="canvas"))
    layer = layer_of(model)
    library = layer.pgn_library["default"]
    assert isinstance(library, PatchLibrary)
    with torch.no_grad():
        library.patch_logits.zero_()
        before = layer.patch_embeddings(normalize(library.patches, MEAN, STD))[:, 0]
        shifts = 1e-2 * torch.randn(library.token_shifts.shape, generator=torch.Generator().manual_seed(0))
        library.token_shifts.copy_(shifts)
        after = layer.patch_embeddings(normalize(library.patches, MEAN, STD))[:, 0]
    torch.testing.assert_close(after - before, shifts, atol=2e-4, rtol=0)


def in_range(size=(32, 32)):
    """Normalised images of 8-bit pixels."""
    pixels = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(0))
    return normalize(pixels / 255, MEAN, STD)


@pytest.mark.parametrize("generator", ["resnet10", "static"])
def test_a_dense_adapter_starts_as_the_frozen_model(generator):
    model = get_peft_model(tiny_vit(), pixel_config(prompt_layout="dense", generator=generator, head="frozen")).eval()
    assert_same(answer(model, in_range()), answer(tiny_vit(), in_range()))
    answer_loss = model(pixel_values=in_range(), labels=torch.arange(4)).loss
    answer_loss.backward()
    assert layer_of(model).pgn_library["default"].token_shifts.grad.abs().max() > 0


def test_a_dense_prompt_shifts_its_patchs_token():
    """Where no pixel is clipped, by the mixture of the library's shifts, up to the rounding to 8 bits."""
    model = get_peft_model(tiny_vit(), pixel_config(prompt_layout="dense")).eval()
    layer = layer_of(model)
    library = layer.pgn_library["default"]
    with torch.no_grad():
        library.token_shifts.normal_(generator=torch.Generator().manual_seed(0))
        pixel_values = normalize(torch.full((2, 3, 32, 32), 128 / 255), MEAN, STD)
        shifts = layer.generator("default")(pixel_values) @ library.token_shifts
        before = layer.patch_embeddings(pixel_values)
        after = layer.patch_embeddings(layer.prompted_images("default", pixel_values))
    assert shifts.shape == (2, 16, 32)
    torch.testing.assert_close(after - before, shifts, atol=0.05 * shifts.abs().max().item(), rtol=0)


@pytest.mark.parametrize("generator", ["resnet10", "static"])
def test_a_dense_adapter_takes_images_of_other_sizes(generator, tmp_path):
    config = pixel_config(prompt_layout="dense", generator=generator)
    model = move_adapter(get_peft_model(tiny_vit(), config)).eval()
    large = in_range((48, 40))
    assert layer_of(model).prompts("default", large).shape == (4, 6 * 5, 3, 8, 8)
    prompted = layer_of(model).prompted_images("default", large)
    assert prompted.shape == large.shape
    expected = answer(tiny_vit(), prompted, interpolate_pos_encoding=True)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model, prompted, interpolate_pos_encoding=True), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(image_size=48), tmp_path).eval()
    assert answer(loaded, in_range((48, 48))).shape == (4, 5)
    with pytest.raises(ValueError, match="`image_size` must be whole patches of 8 pixels, but got 44 x 48"):
        answer(model, in_range((44, 48)), interpolate_pos_encoding=True)


def test_mixing_by_hand():
    library = PatchLibrary(4, 3, 2, 8, directions=torch.zeros(3, 2, 2, 8))
    coefficients = torch.rand(5, 6, 4).softmax(-1)
    prompts = library(coefficients)
    by_hand = sum(coefficients[..., k, None, None, None] * library.patches[k] for k in range(4))
    torch.testing.assert_close(prompts, by_hand)


def test_json_round_trip(tmp_path):
    config = pixel_config(prompt_layout="append", image_size=32, head="frozen", label_mapping=[4, 2])
    config.save_pretrained(tmp_path)
    assert PGNConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("level", [0, 1])
def test_dense_prompts_learn_on_black_and_white_images(level):
    model = get_peft_model(tiny_vit(), pixel_config(generator="static")).train()
    pixel_values = (torch.full((2, 3, 32, 32), float(level)) - 0.5) / 0.5
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    assert bool(layer_of(model).library("default").token_shifts.grad.ne(0).all())
