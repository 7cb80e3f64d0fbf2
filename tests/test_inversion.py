"""Prompt inversion: the stock model, given pixels, answers as the model with the adapter does."""

import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from datasets import load_dataset
from peft import get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from pgn_peft import PGNConfig, make_prompter
from pgn_peft.inversion import invert
from pgn_peft.nn.layout import make_layout
from pgn_peft.nn.patch_inverse import PatchInverse
from pgn_peft.nn.preprocessing import Preprocessing
from pgn_peft.tuner.embeddings import position_tokens

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def processor(side=32):
    return ViTImageProcessor(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 50), (32, 32), (64, 30)]
    return [
        Image.fromarray(torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy())
        for size in sizes
    ]


def adapted(num_virtual_tokens, architecture="ViTForImageClassification", **overrides):
    config = tiny_config(num_virtual_tokens=num_virtual_tokens, head="frozen", **overrides)
    return move_adapter(get_peft_model(tiny_vit(architecture), config)).eval()


@pytest.mark.parametrize(
    ("architecture", "prompts", "overrides"),
    [
        ("ViTForImageClassification", 4, {}),
        ("DeiTForImageClassification", 8, {"generator_rank": 2, "static_prompts": True}),
        ("ViTForImageClassification", 4, {"static_prompts": False}),
        ("ViTForImageClassification", 9, {"generator": "static"}),
    ],
)
def test_the_stock_model_gives_the_latent_models_logits(architecture, prompts, overrides, images):
    model = adapted(prompts, architecture, **overrides)
    expected = answer(model, processor()(images=images, return_tensors="pt")["pixel_values"])
    prompter = make_prompter(model, processor())
    stock = tiny_vit(architecture)
    found = answer(stock, prompter.pixel_values(images), interpolate_pos_encoding=True)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert prompter.report.token_error < 1e-9
    assert not prompter.in_range
    # The prompts matter: without them the answer is another one.
    assert (
        answer(stock, processor()(images=images, return_tensors="pt")["pixel_values"]) - expected
    ).abs().max() > 0.1


def test_the_training_resolution_may_be_another_than_the_models_own(images):
    model = adapted(3)  # 24 px: 3 x 3 patches, one row of 3
    pixel_values = processor(24)(images=images, return_tensors="pt")["pixel_values"]
    expected = answer(model, pixel_values, interpolate_pos_encoding=True)
    prompter = make_prompter(model, processor(24))
    assert prompter.layout.size == (32, 24)
    found = answer(tiny_vit(), prompter.pixel_values(images), interpolate_pos_encoding=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "overrides", "sizes", "in_range", "message"),
    [
        (3, {}, {}, False, "3 prompts do not fill .* to one of 4, 8, 9, 12, 14"),
        # 3 * 4 * 4 = 48 pixels a patch for 64 dimensions, as with ViT-L/14 (588 for 1,024).
        (
            8,
            {},
            {"hidden_size": 64, "patch_size": 4, "num_attention_heads": 4},
            False,
            r"rank 48 \(48 values per patch\), less than its width 64: pixels cannot reach",
        ),
    ],
)
def test_prompts_that_cannot_become_pixels_are_refused(prompts, overrides, sizes, in_range, message):
    model = get_peft_model(tiny_vit(**sizes), tiny_config(num_virtual_tokens=prompts, head="frozen", **overrides))
    with pytest.raises(ValueError, match=message):
        make_prompter(move_adapter(model).eval(), processor(), in_range=in_range)


def test_in_range_a_slots_own_prompt_is_part_of_what_is_inverted():
    embeddings, layout = tiny_vit().vit.embeddings, make_layout("append", (32, 32), 8, 4)
    one, slots = torch.randn(1, 32), torch.randn(4, 32)
    preprocessing = Preprocessing(tuple(MEAN), tuple(STD))
    found = invert(embeddings, one[None], layout, preprocessing, in_range=True, static_prompts=slots)["library"]
    expected = invert(embeddings, (one + slots)[:, None], layout, preprocessing, in_range=True)["library"]
    torch.testing.assert_close(found, expected)


def test_the_pseudo_inverse_and_its_facts():
    weight = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    weight[0] *= 1e-3
    inverse = PatchInverse(weight)
    tokens = torch.randn(7, 16, dtype=torch.float64)
    pixels = inverse.pixels(tokens)
    torch.testing.assert_close(inverse.tokens(pixels), tokens)
    reference = torch.linalg.pinv(weight.double().flatten(1))
    torch.testing.assert_close(pixels, tokens @ reference.mT)
    assert inverse.rank == 16
    assert inverse.condition_number == pytest.approx(torch.linalg.cond(weight.double().flatten(1)).item())
    weight[0] = weight[1]
    assert PatchInverse(weight).rank == 15


def test_pixels_in_range_solve_the_bounded_problem():
    """Against the optimality conditions of bounded least squares, which have one optimum in token space."""
    generator = torch.Generator().manual_seed(0)
    inverse = PatchInverse(torch.randn(8, 3, 2, 2, generator=generator))
    tokens = 8 * torch.randn(20, 8, dtype=torch.float64, generator=generator)
    low, high = torch.full((12,), -1.5, dtype=torch.float64), torch.full((12,), 2.0, dtype=torch.float64)
    pixels = inverse.pixels_in_range(tokens, low, high, steps=3000)
    assert (pixels >= low).all()
    assert (pixels <= high).all()
    gradient = (inverse.tokens(pixels) - tokens) @ inverse.weight
    assert gradient.abs().max() > 1, "the bounds must matter"
    inside = (pixels > low + 1e-6) & (pixels < high - 1e-6)
    assert gradient[inside].abs().max() < 1e-3
    assert (gradient[pixels <= low] > -1e-3).all()
    assert (gradient[pixels >= high] < 1e-3).all()
    # What can be reached is reached.
    easy = inverse.tokens(torch.rand(5, 12, dtype=torch.float64, generator=generator))
    torch.testing.assert_close(inverse.tokens(inverse.pixels_in_range(easy, low, high)), easy, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "scale", "smallest", "largest"),
    [({}, 40, 0, 1e-6), ({"generator": "static"}, 4000, 0.05, 1)],
)
def test_inversion_in_range_gives_valid_images_and_says_what_it_lost(overrides, scale, smallest, largest, images):
    """At 40 the null space is room enough, at 4,000 it is not."""
    model = adapted(4, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pgn_library.default.tokens"):
                parameter.mul_(scale)
    exact = make_prompter(model, processor())
    prompter = make_prompter(model, processor(), in_range=True)
    assert prompter.in_range
    assert prompter.report.in_range
    assert 0 <= prompter.library.min() <= prompter.library.max() <= 1
    assert prompter.report.largest_pixel < 2.7 < exact.report.largest_pixel
    assert smallest <= prompter.report.mean_token_error < largest
    assert len(prompter(images)) == 3
    with pytest.raises(ValueError, match="exact inverted prompts lie far outside"):
        exact(images)


def test_position_tokens_are_what_the_embeddings_add():
    model = tiny_vit("DeiTForImageClassification")  # two tokens before the patches
    embeddings = model.deit.embeddings
    black = embeddings(torch.zeros(1, 3, 32, 32))[0, 2:]
    torch.testing.assert_close(position_tokens(embeddings, (32, 32)).float(), black)
    larger = embeddings(torch.zeros(1, 3, 40, 32), interpolate_pos_encoding=True)[0, 2:]
    torch.testing.assert_close(position_tokens(embeddings, (40, 32)).float(), larger)
    assert next(embeddings.parameters()).dtype == torch.float32, "the backbone must be left as it is"


# (patch, hidden size, prompts): a full-size shape with two layers. Here a patch has as many numbers as a token.
SHAPES = {"ViT-B/16": (16, 768, 14)}


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["DeiT-Tiny", *SHAPES])
def test_real_images_at_full_size(shared, shape):
    rows = load_dataset("parquet", data_files=str(shared / "data/eurosat/validation.parquet"), split="train[:24]")
    checkpoint = shared / "models/deit-tiny-patch16-224"
    torch.manual_seed(0)
    if shape == "DeiT-Tiny":
        stock, prompts = ViTForImageClassification.from_pretrained(checkpoint).eval(), 14
    else:
        patch, width, prompts = SHAPES[shape]
        config = ViTConfig(
            patch_size=patch, hidden_size=width, num_hidden_layers=2, num_attention_heads=6, intermediate_size=512
        )
        stock = ViTForImageClassification(config).eval()
    weights = stock.state_dict()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = get_peft_model(
        stock,
        PGNConfig(
            num_virtual_tokens=prompts, library_size=64, initializer_range=0.3, mixing_init_std=4, head="frozen"
        ),
    ).eval()
    expected = answer(model, processor(images=rows["image"][:], return_tensors="pt")["pixel_values"])
    prompter = make_prompter(model, processor)
    unmodified = ViTForImageClassification(stock.config).eval()
    unmodified.load_state_dict({name: weights[name] for name in unmodified.state_dict()})
    found = answer(unmodified, prompter.pixel_values(rows["image"][:]), interpolate_pos_encoding=True)
    assert (found - expected).abs().max() < 1e-3
    assert torch.equal(found.argmax(1), expected.argmax(1))
