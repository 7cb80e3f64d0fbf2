"""A different adapter for each image of a batch gives each image what its adapter gives it alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import PIXEL, answer, assert_same, move_adapter, refused, tiny_config, tiny_vit
from peft import get_peft_model

ADAPTERS = {
    "latent": {},
    "lean": {"generator_rank": 2},
    "static": {"generator": "static"},
    "frozen": {"head": "frozen"},
    "deep": {"prompt_depth": "all"},
    "deep and static": {"prompt_depth": 2, "generator": "static"},
    "pixel": PIXEL,
    "tile": PIXEL | {"generator": "static"},
}
GROUPS = [
    ["latent", "lean", "static", "frozen"],
    ["deep", "deep and static"],
    ["pixel", "__base__", "tile"],
]


def serve(adapters=ADAPTERS, architecture="ViTForImageClassification", **base):
    """A model in eval mode with these adapters, the first one active."""
    names = iter(adapters)
    first = next(names)
    model = get_peft_model(tiny_vit(architecture, **base), tiny_config(**adapters[first]), adapter_name=first)
    for name in names:
        model.add_adapter(name, tiny_config(**adapters[name]))
    return move_adapter(model).eval()


def alone(model, pixel_values, name):
    """What an adapter answers when it is the active one."""
    if name == "__base__":
        with model.disable_adapter():
            return answer(model, pixel_values)
    before = model.active_adapter
    model.set_adapter(name)
    logits = answer(model, pixel_values)
    model.set_adapter(before)
    return logits


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) / 2


def each_alone(model, pixel_values, names):
    return torch.stack([alone(model, pixel_values, name)[row] for row, name in enumerate(names)])


@pytest.mark.parametrize(
    ("architecture", "group"),
    [
        *(("ViTForImageClassification", group) for group in GROUPS),
        ("SiglipForImageClassification", GROUPS[0]),
        ("BeitForImageClassification", GROUPS[1]),
        ("TimmWrapperForImageClassification", GROUPS[0]),
    ],
)
def test_each_image_gets_what_its_adapter_gives_it_alone(architecture, group):
    model = serve(architecture=architecture)
    names = [*group, *reversed(group), group[0]]
    pixel_values = images(len(names))
    expected = each_alone(model, pixel_values, names)
    assert len({tuple(row) for row in expected.round(decimals=2).tolist()}) == len(names)
    assert_same(answer(model, pixel_values, adapter_names=names), expected, valid_pixels="pixel" in group)
    with torch.no_grad():
        by_name = model(pixel_values=pixel_values, adapter_names=tuple(names), return_dict=False)[0]
    assert_same(by_name, expected, valid_pixels="pixel" in group)


def test_adapters_with_other_numbers_of_tokens_share_a_batch():
    model = serve(ADAPTERS | {"longer": {"num_virtual_tokens": 5}})
    names = ["latent", "longer", "__base__", "deep", "pixel", "latent"]
    pixel_values = images(len(names))
    expected = each_alone(model, pixel_values, names)
    assert_same(answer(model, pixel_values, adapter_names=names), expected, valid_pixels=True)


@pytest.mark.parametrize("architecture", ["ViTModel", "CLIPVisionModelWithProjection"])
def test_features(architecture):
    model = serve({"a": {}, "b": {"generator": "static"}}, architecture)
    pixel_values = images(4)
    names = ["b", "a", "a", "b"]
    assert_same(answer(model, pixel_values, adapter_names=names), each_alone(model, pixel_values, names), 1e-4)


def test_nothing_of_it_is_left_after_a_failure():
    model = serve()
    base = model.get_base_model()
    pixel_values = images(4)
    names = ["latent", "lean", "static", "latent"]
    before, attributes = answer(model, pixel_values), set(vars(base))
    mixed = answer(model, pixel_values, adapter_names=names)

    def fail(module, args):
        raise RuntimeError("in the middle of a batch")

    hook = base.vit.layernorm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of a batch"):
        model(pixel_values, adapter_names=names)
    hook.remove()
    assert set(vars(base)) == attributes
    assert model.active_adapter == "latent"
    assert torch.equal(answer(model, pixel_values), before)
    assert_same(answer(copy.deepcopy(model), pixel_values, adapter_names=names), mixed)


@pytest.mark.slow
def test_a_compiled_model_serves_them_among_others():
    torch.compiler.reset()
    static = {"generator": "static"}  # which compiles in a moment
    model = serve({"static": static, "other": static})
    pixel_values = images(3)
    names = ["static", "other", "static"]
    expected = [answer(model, pixel_values), answer(model, pixel_values, adapter_names=names)]
    compiled = torch.compile(model, backend="aot_eager")
    for mixed in (False, True, False):
        options = {"adapter_names": names} if mixed else {}
        assert_same(answer(compiled, pixel_values, **options), expected[mixed])


def test_other_image_sizes_and_half_precision():
    adapters = {"a": {}, "static": {"generator": "static"}, "frozen": {"head": "frozen"}}
    model = serve(adapters)
    pixel_values = torch.randn(4, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    names = ["static", "frozen", "a", "static"]
    options = {"interpolate_pos_encoding": True}

    def one_by_one():
        rows = [pixel_values[row : row + 1] for row in range(len(names))]
        return torch.cat(
            [answer(model, row, adapter_names=[name], **options) for row, name in zip(rows, names, strict=True)]
        )

    exact = answer(model, pixel_values, adapter_names=names, **options)
    assert_same(exact, one_by_one(), 1e-4)
    model.to(torch.bfloat16)
    # What half precision loses is no more in a mixed batch than image by image.
    lost = (one_by_one().float() - exact).abs().max()
    found = answer(model, pixel_values, adapter_names=names, **options).float()
    assert (found - exact).abs().max() < 2 * lost


def test_label_mapping_is_per_image():
    two = dict(enumerate("ab"))
    mapped = {"head": "frozen", "id2label": two}
    model = serve(
        {
            "up": mapped | {"label_mapping": [3, 1]},
            "down": mapped | {"label_mapping": [0, 4]},
            "own": {"id2label": two},
        }
    )
    pixel_values = images(3)
    names = ["down", "own", "up"]
    assert_same(answer(model, pixel_values, adapter_names=names), each_alone(model, pixel_values, names))


def test_threads_do_not_see_each_others_batches():
    model = serve()
    pixel_values = images(8)
    batches = [[group[(row + shift) % len(group)] for row in range(8)] for group in GROUPS for shift in range(5)]
    expected = [answer(model, pixel_values, adapter_names=names) for names in batches]
    plain = answer(model, pixel_values)

    def serve_one(index):
        if index % 3 == 2:  # and calls without names go on beside them
            assert_same(answer(model, pixel_values), plain)
        else:
            batch = index % len(batches)
            found = answer(model, pixel_values, adapter_names=batches[batch])
            assert_same(found, expected[batch], valid_pixels="pixel" in batches[batch])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve_one, range(48)))


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"adapter_names": "latent"}, ValueError, "latent"),
        ({"adapter_names": ["latent", 3]}, ValueError, "3"),
        ({"adapter_names": ["latent", "mroe"]}, ValueError, "mroe"),
        ({"adapter_names": ["latent"]}, ValueError, "2"),
        ({"adapter_names": ["latent"] * 2, "labels": torch.tensor([0, 1])}, ValueError, "labels"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, word):
    model = serve({"latent": {}, "static": {"generator": "static"}})
    expected = answer(model, images(2))
    with refused(error, word):
        model(images(2), **arguments)
    assert torch.equal(answer(model, images(2)), expected)


def test_modules_of_their_own_training_and_calls_past_peft_are_refused():
    with refused(ValueError, "modules_to_save"):
        serve({"latent": {}, "more": {"modules_to_save": ["vit.layernorm"]}})(images(1), adapter_names=["latent"])
    model = serve({"latent": {}})
    with refused(ValueError, "adapter_names"):
        model.get_base_model()(images(1), adapter_names=["latent"])
    with refused(ValueError, "adapter_names"):
        model.train()(images(1), adapter_names=["latent"])
