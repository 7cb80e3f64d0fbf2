"""A different adapter for each image of a batch gives each image what its adapter gives it alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REPRESENTATIVE_CLASSIFIERS, answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model

FIVE = {index: f"LABEL_{index}" for index in range(5)}  # those of the tiny models
PIXEL = {"prompt_space": "pixel", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
ADAPTERS = {
    "latent": {},
    "sigmoid": {"mixing": "sigmoid"},
    "static": {"generator": "static"},
    "frozen": {"head": "frozen"},
    "longer": {"num_virtual_tokens": 5},
    "deep": {"prompt_depth": None},
    "deep and static": {"prompt_depth": 2, "generator": "static"},
    "canvas": PIXEL,
    "lighter canvas": PIXEL | {"image_offset": False},
    "dense": PIXEL | {"prompt_layout": "dense"},
}
# Adapters whose images have equally many tokens.
GROUPS = [
    ["latent", "sigmoid", "static", "frozen"],
    ["deep", "deep and static"],
    ["canvas", "__base__", "lighter canvas", "dense"],
]


def serve(adapters=ADAPTERS, architecture="ViTForImageClassification", **base):
    """A model in eval mode with these adapters, the first one active."""
    names = iter(adapters)
    first = next(names)
    overrides = {
        name: {"num_virtual_tokens": None if "prompt_space" in fields else 3} | fields
        for name, fields in adapters.items()
    }
    model = get_peft_model(tiny_vit(architecture, **base), tiny_config(**overrides[first]), adapter_name=first)
    for name in names:
        model.add_adapter(name, tiny_config(**overrides[name]))
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


@pytest.mark.parametrize("architecture", REPRESENTATIVE_CLASSIFIERS)
@pytest.mark.parametrize("group", GROUPS)
def test_each_image_gets_what_its_adapter_gives_it_alone(architecture, group):
    model = serve(architecture=architecture)
    names = [*group, *reversed(group), group[0]]
    pixel_values = images(len(names))
    expected = each_alone(model, pixel_values, names)
    assert len({tuple(row) for row in expected.round(decimals=2).tolist()}) == len(names)
    # In pixel space a rounding to 8 bits can fall to the other side.
    tolerances = {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(answer(model, pixel_values, adapter_names=names), expected, **tolerances)
    with torch.no_grad():
        by_name = model(pixel_values=pixel_values, adapter_names=tuple(names), return_dict=False)[0]
    torch.testing.assert_close(by_name, expected, **tolerances)


@pytest.mark.parametrize(
    "names", [["latent", "longer"], ["latent", "__base__"], ["canvas", "latent"], ["deep", "static"]]
)
def test_adapters_with_other_numbers_of_tokens_are_refused(names):
    with pytest.raises(ValueError, match=f"equally many tokens in one batch, but got '{names[0]}' .* '{names[1]}'"):
        serve()(images(2), adapter_names=names)


def test_nothing_of_it_is_left_after_a_failure():
    model = serve()
    base = model.get_base_model()
    pixel_values = images(4)
    names = ["latent", "sigmoid", "static", "latent"]
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


@pytest.mark.parametrize("architecture", ["ViTModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"])
def test_features(architecture):
    model = serve({"a": {}, "b": {"generator": "static"}}, architecture)
    pixel_values = images(4)
    names = ["b", "a", "a", "b"]
    torch.testing.assert_close(
        answer(model, pixel_values, adapter_names=names), each_alone(model, pixel_values, names), rtol=1e-4, atol=1e-4
    )


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
        torch.testing.assert_close(answer(compiled, pixel_values, **options), expected[mixed])


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
    torch.testing.assert_close(exact, one_by_one(), rtol=1e-4, atol=1e-5)
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
    expected = torch.stack([alone(model, pixel_values, name)[row] for row, name in enumerate(names)])
    torch.testing.assert_close(answer(model, pixel_values, adapter_names=names), expected)


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
            assert_same(answer(model, pixel_values, adapter_names=batches[batch]), expected[batch])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve_one, range(96)))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("latent", TypeError, "`adapter_names` must be a list with a name for each image, but got 'latent'"),
        (["latent", 3], TypeError, r"`adapter_names` must be a list .*, but got \['latent', 3\]"),
        (["latent", "mroe"], ValueError, "must hold loaded adapters, latent, other, __base__, but got 'mroe'.*Load"),
        (["latent"], ValueError, "must have a name for each of the 2 images, but got 1"),
        (["latent"] * 3, ValueError, "must have a name for each of the 2 images, but got 3"),
        (["latent", "other"], ValueError, "same labels.*but got 'latent' with LABEL_0, .* and 'other' with cat, dog"),
        (["other", "__base__"], ValueError, "same labels.*but got 'other' with cat, dog and '__base__' with LABEL_0"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, error, message):
    model = serve({"latent": {}, "other": {"id2label": {0: "cat", 1: "dog"}}})
    expected = answer(model, images(2))
    with pytest.raises(error, match=message):
        model(images(2), adapter_names=names)
    assert torch.equal(answer(model, images(2)), expected)


def test_training_is_refused():
    model = serve({"latent": {}}).train()
    with pytest.raises(ValueError, match="`adapter_names` must be used in eval mode, but got .*in training mode"):
        model(images(1), adapter_names=["latent"])


def test_labels_are_refused():
    model = serve({"latent": {}})
    with pytest.raises(ValueError, match=r"`labels` must be left out with `adapter_names`, but got a tensor \(1,\)"):
        model(images(1), adapter_names=["latent"], labels=torch.tensor([0]))


def test_wrong_images_are_refused_as_always():
    model = serve({"latent": {}})
    with pytest.raises(ValueError, match="`pixel_values` must have the four axes"):
        model(images(1)[0], adapter_names=["latent"])
    with pytest.raises(TypeError, match="`pixel_values` must be a tensor"):
        model(adapter_names=["latent"])


def test_modules_of_an_adapters_own_are_refused():
    model = serve({"latent": {}, "more": {"modules_to_save": ["vit.layernorm"]}})
    with pytest.raises(
        ValueError, match=r"beside an adapter with `modules_to_save`, but got 'more', which has \['vit"
    ):
        model(images(1), adapter_names=["latent"])


def test_names_that_come_past_peft_are_refused():
    model = serve({"latent": {}})
    with pytest.raises(ValueError, match="`adapter_names` must be passed to a PeftModel, but got .'latent'"):
        model.get_base_model()(images(1), adapter_names=["latent"])
