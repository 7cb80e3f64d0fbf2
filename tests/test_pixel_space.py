"""Adapters in pixel space: PEFT's contract, valid pixels, and what was trained is what is deployed."""

import pytest
import torch
from conftest import PIXEL, answer, assert_same, move_adapter, refused, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftModel, get_peft_model

from pgn_peft import PGNConfig
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.adapters import prompt_layer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
generators = pytest.mark.parametrize("generator", ["resnet10", "static"])


def pixel_config(**overrides):
    return tiny_config(**(PIXEL | {"image_mean": MEAN, "image_std": STD} | overrides))


def in_range(size=(32, 32)):
    """Normalised images of 8-bit pixels."""
    pixels = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(0))
    return normalize(pixels / 255, MEAN, STD)


@pytest.mark.parametrize(
    ("architecture", "generator"),
    [
        ("ViTForImageClassification", "resnet10"),
        ("DeiTForImageClassification", "static"),
        ("ViTModel", "resnet10"),
        ("Dinov2ForImageClassification", "static"),
    ],
)
def test_the_adapted_model_is_the_stock_model_on_the_prompted_image(architecture, generator, pixel_values):
    base = tiny_vit(architecture)
    before = answer(base, pixel_values)
    head = {"head": "frozen"} if architecture.endswith("Classification") else {}
    model = move_adapter(get_peft_model(base, pixel_config(generator=generator, **head))).eval()
    prompted = prompt_layer(model).prompted_images("default", pixel_values)
    assert prompted.shape == pixel_values.shape
    assert_same(answer(model, pixel_values), answer(tiny_vit(architecture), prompted), valid_pixels=True)
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)


@generators
def test_training_moves_the_whole_adapter_and_keeps_pixels_valid(generator, pixel_values):
    model = get_peft_model(tiny_vit(), pixel_config(generator=generator))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(in_range(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    prompted = denormalize(prompt_layer(model).prompted_images("default", in_range()), MEAN, STD)
    assert prompted.min() > -1e-5
    assert prompted.max() < 1 + 1e-5
    assert_same(prompted * 255, (prompted * 255).round(), tolerance=1e-4)


def test_it_is_loaded_beside_a_latent_adapter_and_by_auto_peft_model(pixel_values, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "vit")
    base = type(tiny_vit()).from_pretrained(tmp_path / "vit")
    model = move_adapter(get_peft_model(base, pixel_config(num_labels=3))).eval()
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert_same(answer(loaded, pixel_values), expected, valid_pixels=True)
    recorded = loaded.peft_config["default"]
    assert (recorded.patch_size, recorded.hidden_size, recorded.num_virtual_tokens) == (8, 32, 16)
    again = get_peft_model(tiny_vit(), tiny_config()).eval()
    again.load_adapter(tmp_path / "adapter", "second")
    again.set_adapter("second")
    assert_same(answer(again, pixel_values), expected, valid_pixels=True)


def test_unload_and_delete_leave_nothing(pixel_values):
    base = tiny_vit()
    before = answer(base, pixel_values)
    model = get_peft_model(base, pixel_config())
    model.add_adapter("latent", tiny_config())
    model.delete_adapter("default")
    assert list(prompt_layer(model).configs) == ["latent"]
    assert torch.equal(answer(model.unload(), pixel_values), before)


def test_a_latent_adapter_beside_it_appends_to_the_prompted_image(pixel_values):
    model = get_peft_model(tiny_vit("ViTModel"), pixel_config())
    model.add_adapter("latent", tiny_config())
    move_adapter(model).eval()
    model.base_model.set_adapter(["default", "latent"])
    assert answer(model, pixel_values).shape == (4, 1 + 16 + 3, 32)


def test_two_adapters_in_pixel_space_at_once_are_refused(pixel_values):
    model = get_peft_model(tiny_vit(), pixel_config())
    model.add_adapter("second", pixel_config())
    with refused(ValueError, "default", "second"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("second")
    assert answer(model, pixel_values).shape == (4, 5)


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"image_mean": None}, ValueError, "image_mean"),
        ({"image_std": [0.2, 0.0, 0.2]}, ValueError, "image_std"),
        ({"image_mean": 0.5}, TypeError, "image_mean"),
        ({"image_mean": [0.5], "image_std": [0.5]}, ValueError, "3"),
        ({"static_prompts": True}, ValueError, "static_prompts"),
        ({"prompt_space": "pixels"}, ValueError, "pixels"),
        ({"generator_rank": 4}, ValueError, "generator_rank"),
        ({"prompt_layout": "below"}, ValueError, "below"),
        ({"num_virtual_tokens": 12}, ValueError, "16"),
    ],
)
def test_impossible_configs_are_refused_and_leave_the_model_alone(fields, error, word):
    model = tiny_vit()
    with refused(error, word):
        get_peft_model(model, pixel_config(**fields))
    assert not any("pgn" in name for name, _ in model.named_modules())


def test_one_channel(pixel_values):
    model = get_peft_model(tiny_vit(num_channels=1), pixel_config(image_mean=[0.5], image_std=[0.5])).eval()
    assert answer(model, pixel_values[:, :1]).shape == (4, 5)


def test_bfloat16(pixel_values):
    """No more is lost than the backbone loses by itself on the prompted image."""
    model = move_adapter(get_peft_model(tiny_vit(), pixel_config(head="frozen"))).eval()
    expected = answer(model, pixel_values)
    prompted = prompt_layer(model).prompted_images("default", pixel_values)
    lost = (answer(tiny_vit().bfloat16(), prompted.bfloat16()).float() - answer(tiny_vit(), prompted)).abs().max()
    found = answer(model.to(torch.bfloat16), pixel_values.bfloat16()).float()
    assert (found - expected).abs().max() < 3 * lost


@generators
def test_a_new_adapter_starts_as_the_frozen_model(generator):
    model = get_peft_model(tiny_vit(), pixel_config(generator=generator, head="frozen")).eval()
    assert_same(answer(model, in_range()), answer(tiny_vit(), in_range()))
    model(pixel_values=in_range(), labels=torch.arange(4)).loss.backward()
    assert prompt_layer(model).library("default").token_shifts.grad.abs().max() > 0


def test_a_prompt_shifts_its_patchs_token():
    """Where no pixel is clipped, by the mixture of the library's shifts, up to the rounding to 8 bits."""
    model = get_peft_model(tiny_vit(), pixel_config()).eval()
    layer = prompt_layer(model)
    library = layer.library("default")
    with torch.no_grad():
        library.token_shifts.normal_(generator=torch.Generator().manual_seed(0))
        pixel_values = normalize(torch.full((2, 3, 32, 32), 128 / 255), MEAN, STD)
        shifts = layer.generator("default")(pixel_values) @ library.token_shifts
        before = layer.projection(pixel_values).flatten(2).mT
        after = layer.projection(layer.prompted_images("default", pixel_values)).flatten(2).mT
    assert shifts.shape == (2, 16, 32)
    assert_same(after - before, shifts, tolerance=0.05)


@generators
def test_images_of_other_sizes(generator, tmp_path):
    model = move_adapter(get_peft_model(tiny_vit(), pixel_config(generator=generator))).eval()
    large = in_range((48, 40))
    layer = prompt_layer(model)
    assert layer.prompts("default", large).shape == (4, 6 * 5, 3, 8, 8)
    prompted = layer.prompted_images("default", large)
    assert prompted.shape == large.shape
    expected = answer(tiny_vit(), prompted, interpolate_pos_encoding=True)
    with model.disable_adapter():
        assert_same(answer(model, prompted, interpolate_pos_encoding=True), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(image_size=48), tmp_path).eval()
    assert answer(loaded, in_range((48, 48))).shape == (4, 5)
    with refused(ValueError, "44"):
        answer(model, in_range((44, 48)), interpolate_pos_encoding=True)


def test_json_round_trip(tmp_path):
    config = pixel_config(head="frozen", label_mapping=[4, 2])
    config.save_pretrained(tmp_path)
    assert PGNConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("level", [0, 1])
def test_prompts_learn_on_black_and_white_images(level):
    model = get_peft_model(tiny_vit(), pixel_config(generator="static")).train()
    pixel_values = normalize(torch.full((2, 3, 32, 32), float(level)), MEAN, STD)
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    assert bool(prompt_layer(model).library("default").token_shifts.grad.ne(0).all())
