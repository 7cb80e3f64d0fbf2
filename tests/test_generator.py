"""The generator and the library: shapes, mixing, norms at the edges, sizes."""

import pytest
import torch
from conftest import assert_nearly_equal

from pgn_peft.nn.generator import BatchNorm2d, FactorisedHead, PromptGenerator, resize_shorter_side
from pgn_peft.nn.library import TokenLibrary


def make(**overrides):
    torch.manual_seed(0)
    return PromptGenerator(**({"num_virtual_tokens": 3, "library_size": 6, "width": 4} | overrides))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_coefficients_are_convex_weights_for_any_image_size(norm):
    for size in ((32, 32), (40, 24), (7, 9)):
        coefficients = make(norm=norm)(torch.randn(2, 3, *size))
        assert coefficients.shape == (2, 3, 6)
        assert (coefficients >= 0).all()
        torch.testing.assert_close(coefficients.sum(dim=-1), torch.ones(2, 3))


def test_different_images_get_different_coefficients():
    generator = make().eval()
    one, other = generator(torch.randn(2, 3, 32, 32))
    assert (one - other).abs().max() > 1e-4


def test_mixing_init_std_starts_each_prompt_near_a_token_of_its_own():
    images = torch.randn(2, 3, 32, 32)
    alike = make(num_virtual_tokens=16, library_size=64).eval()(images)
    apart = make(num_virtual_tokens=16, library_size=64, mixing_init_std=4.0).eval()(images)
    assert alike.max() < 0.05
    assert apart.max(dim=-1).values.median() > 0.5
    assert len(apart.argmax(dim=-1)[0].unique()) > 8


def test_a_factorised_head_gives_products_of_queries_and_keys():
    head = FactorisedHead(num_features=5, num_virtual_tokens=3, library_size=7, rank=2)
    torch.nn.init.normal_(head.bias)
    features = torch.randn(4, 5)
    queries = head.queries(features).view(4, 3, 2)
    expected = torch.einsum("bpr,lr->bpl", queries, head.keys) + head.bias.view(3, 7)
    torch.testing.assert_close(head(features).view(4, 3, 7), expected)


def test_a_factorised_generator_is_a_generator_of_a_fraction_of_the_size():
    images = torch.randn(2, 3, 32, 32)
    coefficients = make(rank=2).eval()(images)
    torch.testing.assert_close(coefficients.sum(dim=-1), torch.ones(2, 3))
    apart = make(num_virtual_tokens=16, library_size=64, rank=8, mixing_init_std=4.0).eval()(images)
    assert apart.max(dim=-1).values.median() > 0.5
    head, official = PromptGenerator(16, 256, rank=8).head, PromptGenerator(16, 256).head
    assert sum(p.numel() for p in head.parameters()) == 22_656
    assert sum(p.numel() for p in official.parameters()) == 528_384


def test_group_norm_answers_for_each_image_by_itself():
    generator = make(norm="group", width=8).train()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(generator(images)[:1], generator(images[:1]))
    assert not any("running" in name for name, _ in generator.named_buffers())


def test_one_image_of_one_pixel_trains_with_batch_norm():
    # 32 px shrink to 1 x 1 before the last norms: torch's BatchNorm2d raises on this batch.
    generator = make().train()
    before = generator.trunk.block4.norm2.running_mean.clone()
    generator(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())
    assert torch.equal(generator.trunk.block4.norm2.running_mean, before)
    assert generator.trunk.stem_norm.num_batches_tracked == 1  # its input has 16 x 16 pixels


def test_batch_norm_is_torchs_own_away_from_the_edges():
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for _ in range(3):
        images = torch.randn(5, 4, 6, 6)
        assert_nearly_equal(ours(images), theirs(images))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_frozen_batch_norm_keeps_its_statistics_in_train_mode():
    norm = BatchNorm2d(4).train().requires_grad_(False)
    images = torch.randn(5, 4, 6, 6) * 3 + 1
    assert_nearly_equal(norm(images), norm.eval()(images))
    assert norm.num_batches_tracked == 0


def test_coefficients_are_computed_in_the_generators_dtype():
    images = torch.randn(2, 3, 32, 32).bfloat16()
    generator = make().eval()
    assert_nearly_equal(generator(images), generator(images.float()))
    generator.bfloat16()
    assert generator(images.float()).dtype == torch.bfloat16


def test_the_shorter_side_is_resized_and_the_aspect_ratio_kept():
    for before, after in (((32, 32), (16, 16)), ((48, 32), (24, 16)), ((8, 12), (16, 24)), ((16, 40), (16, 40))):
        images = torch.rand(1, 3, *before)
        resized = resize_shorter_side(images, 16)
        assert resized.shape == (1, 3, *after)
        assert (resized is images) == (before == after)


def test_generator_image_size_is_what_the_trunk_sees():
    seen = []
    generator = make(image_size=16).eval()
    generator.trunk.stem_conv.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    generator(torch.randn(2, 3, 48, 32))
    assert seen == [(2, 3, 24, 16)]


def test_library_mixes_and_gives_its_tokens_as_they_are():
    library = TokenLibrary(4, 8)
    coefficients = torch.tensor([[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]])
    prompts = library(coefficients)
    torch.testing.assert_close(prompts[0, 0], library.tokens[0])
    torch.testing.assert_close(prompts[0, 1], (library.tokens[1] + library.tokens[2]) / 2)
    assert torch.equal(library.all_entries(3), library.tokens.expand(3, -1, -1))


def test_slot_prompts_are_added_to_every_mixture():
    library = TokenLibrary(4, 8, num_slots=2)
    coefficients = torch.rand(3, 2, 4)
    torch.testing.assert_close(library(coefficients), coefficients @ library.tokens + library.slot_prompts)
    assert TokenLibrary(4, 8).slot_prompts is None


def test_sizes_are_those_of_the_official_code():
    generator, library = PromptGenerator(16, 256), TokenLibrary(256, 768)
    assert sum(p.numel() for p in [*generator.parameters(), *library.parameters()]) == 1_032_304


def test_a_generator_cast_to_bfloat16_resizes_too():
    generator = PromptGenerator(2, 3, image_size=16, width=4).eval()
    images = torch.randn(2, 3, 40, 30)
    expected = generator(images)
    found = generator.to(torch.bfloat16)(images.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)


def test_gradients_have_the_strides_of_their_weights():
    # DistributedDataParallel warns of others, and copies.
    generator = PromptGenerator(num_virtual_tokens=3, library_size=5)
    generator(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
