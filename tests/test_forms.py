"""Every form in which a backbone is used: sizes, channels, dtypes, attention, checkpointing, losses."""

import copy

import pytest
import torch
from conftest import (
    CLASSIFIERS,
    PIXEL,
    REPRESENTATIVES,
    answer,
    assert_same,
    embed,
    embeddings_of,
    move_adapter,
    refused,
    tiny_config,
    tiny_vit,
)
from peft import get_peft_model

from pgn_peft.tuner.adapters import prompt_layer


def adapt(base, **overrides):
    return move_adapter(get_peft_model(base, tiny_config(**overrides))).eval()


@pytest.mark.parametrize("architecture", REPRESENTATIVES)
def test_other_and_non_square_sizes(architecture):
    images = torch.randn(2, 3, 24, 40)
    model = adapt(tiny_vit(architecture))
    layer = prompt_layer(model)
    options = {"interpolate_pos_encoding": True} if layer.takes_size_option else {}
    tokens = embed(model, images, **options)
    assert_same(tokens[:, :-3], embed(tiny_vit(architecture), images, **options))
    with model.disable_adapter():
        assert_same(answer(model, images, **options), answer(tiny_vit(architecture), images, **options))
    told = answer(model, images, interpolate_pos_encoding=True)
    assert told.isfinite().all()
    if not layer.takes_size_option:
        assert_same(answer(model, images), told)
    else:
        with refused(ValueError, "interpolate_pos_encoding=True"):
            answer(model, images)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_channels": 1, "image_size": 48, "patch_size": 16, "hidden_size": 16},
        {"num_channels": 4, "image_size": 64, "patch_size": 32, "hidden_size": 64},
        {"num_channels": 3, "image_size": 32, "patch_size": 4, "hidden_size": 48},
    ],
)
def test_sizes_and_channels_come_from_the_model(sizes):
    model = adapt(tiny_vit(**sizes))
    assert model.peft_config["default"].hidden_size == sizes["hidden_size"]
    assert model.peft_config["default"].num_channels == sizes["num_channels"]
    images = torch.randn(2, sizes["num_channels"], sizes["image_size"], sizes["image_size"])
    assert answer(model, images).shape == (2, 5)


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "DINOv3ViTModel", "BeitForImageClassification"])
def test_attentions_and_hidden_states_include_the_prompts(architecture, pixel_values):
    answers = []
    for attention in ("eager", "sdpa"):
        base = tiny_vit(architecture, attn_implementation=attention)
        length = embeddings_of(base)(pixel_values).shape[1] + 3
        model = adapt(base)
        answers.append(answer(model, pixel_values))
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=attention == "eager")
        assert [state.shape for state in outputs.hidden_states] == [(4, length, 32)] * 3
        if attention == "eager":
            assert [weights.shape for weights in outputs.attentions] == [(4, 2, length, length)] * 2
    assert_same(*answers)


@pytest.mark.parametrize(
    ("architecture", "generator", "dtype"),
    [
        ("ViTForImageClassification", "resnet10", torch.bfloat16),
        ("ViTForImageClassification", "static", torch.float16),
        ("BeitForImageClassification", "resnet10", torch.bfloat16),
        ("DINOv3ViTModel", "resnet10", torch.bfloat16),
        ("TimmWrapperForImageClassification", "resnet10", torch.bfloat16),
    ],
)
def test_half_precision_backbone_with_a_float32_adapter(architecture, generator, dtype, pixel_values):
    exact = answer(adapt(tiny_vit(architecture), generator=generator), pixel_values)
    if architecture.startswith("Beit"):  # which does not convert its images
        pixel_values = pixel_values.to(dtype)
    model = adapt(tiny_vit(architecture).to(dtype), generator=generator)
    assert {p.dtype for name, p in model.named_parameters() if "pgn_" in name} == {torch.float32}
    rounded = answer(model, pixel_values)
    # The adapter's head answers in its own precision, features come in the backbone's.
    assert rounded.dtype == (torch.float32 if architecture in CLASSIFIERS else dtype)
    # Prompts leave the backbone's own rounding what it was.
    plain = answer(tiny_vit(architecture), pixel_values.float())
    rounding = (answer(tiny_vit(architecture).to(dtype), pixel_values).float() - plain).abs().max().item()
    assert (rounded.float() - exact).abs().max().item() < 5 * rounding
    with model.disable_adapter():
        assert answer(model, pixel_values).dtype == dtype
    # The whole model in half precision: so is the head, and little is lost.
    whole = answer(model.to(dtype), pixel_values)
    assert whole.dtype == dtype
    assert (whole.float() - exact).abs().max().item() < 5 * rounding


def test_autocast_training_step(pixel_values):
    model = adapt(tiny_vit()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixel_values, labels=torch.tensor([0, 1, 2, 3])).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    exact = model(pixel_values, labels=torch.tensor([0, 1, 2, 3])).loss
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("use_reentrant", "enabled_first"), [(False, True), (True, False)])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, enabled_first, pixel_values):
    labels = torch.tensor([0, 1, 2, 3])
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    plain = adapt(tiny_vit(), generator_norm="group").train()
    plain(pixel_values, labels=labels).loss.backward()
    base = tiny_vit()
    if enabled_first:
        base.gradient_checkpointing_enable(**arguments)
    model = adapt(base, generator_norm="group").train()
    if not enabled_first:
        model.gradient_checkpointing_enable(**arguments)
    model(pixel_values, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert_same({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected, tolerance=1e-4)


@pytest.mark.parametrize("form", [{}, {"prompt_depth": "all"}])
def test_a_deep_copy_is_independent(form, pixel_values):
    model = adapt(tiny_vit(), id2label=dict(enumerate("ab")), **form)
    expected = answer(model, pixel_values)
    twin = copy.deepcopy(model)
    assert_same(answer(twin, pixel_values), expected)
    with twin.disable_adapter():
        assert (model.config.num_labels, twin.config.num_labels) == (2, 5)
        assert torch.equal(answer(model, pixel_values), expected)
    move_adapter(twin, seed=5)
    twin.base_model.disable_adapter_layers()
    assert torch.equal(answer(model, pixel_values), expected)
    assert_same(answer(twin, pixel_values), answer(tiny_vit(), pixel_values))


def test_last_batch_of_one_image(pixel_values):
    model = adapt(tiny_vit()).train()
    model(pixel_values[:1], labels=torch.tensor([1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "labels", "problem_type"),
    [
        ({"num_labels": 1}, torch.rand(4), "regression"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.rand(4, 3), "regression"),
        ({"num_labels": 3}, torch.eye(4)[:, :3], "multi_label_classification"),
        ({"num_labels": 3}, torch.tensor([0, 1, 2, 0]), "single_label_classification"),
    ],
)
def test_losses_of_transformers(config, labels, problem_type, pixel_values):
    model = adapt(tiny_vit(), **config)
    outputs = model(pixel_values, labels=labels)
    logits = outputs.logits
    expected = {
        "regression": lambda: (logits.squeeze() - labels).square().mean(),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(logits, labels),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(logits, labels),
    }[problem_type]()
    torch.testing.assert_close(outputs.loss, expected)
    assert model.config.problem_type == problem_type
    # What Transformers read off one adapter's labels is not kept for another's.
    model.add_adapter("other", tiny_config(num_labels=2))
    model.set_adapter("other")
    assert model.config.problem_type is None
    model(pixel_values, labels=torch.tensor([0, 1, 1, 0]))
    assert model.config.problem_type == "single_label_classification"
    with model.disable_adapter():
        assert model.config.problem_type is None


def test_masked_positions_still_reach_the_embeddings(pixel_values):
    base = tiny_vit("ViTModel")
    base.embeddings.mask_token = torch.nn.Parameter(torch.randn(1, 1, 32))
    masked = torch.zeros(4, 16, dtype=torch.bool)
    masked[:, 3] = True
    expected = base.embeddings(pixel_values, bool_masked_pos=masked)
    model = adapt(base)
    assert_same(model.embeddings(pixel_values, bool_masked_pos=masked)[:, :17], expected)


@pytest.mark.parametrize("form", [{"prompt_depth": "all"}, PIXEL])
def test_an_adapter_in_the_backbones_dtype_on_demand(form, pixel_values):
    def dtypes():
        return {t.dtype for n, t in model.state_dict().items() if "pgn_" in n and t.is_floating_point()}

    base = tiny_vit().to(torch.bfloat16)
    model = get_peft_model(base, tiny_config(**form), autocast_adapter_dtype=False)
    assert dtypes() == {torch.bfloat16}
    model.train()
    loss = model(pixel_values.bfloat16(), labels=torch.tensor([0, 1, 2, 3])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    # What PEFT does by default, also with an adapter that is there: `load_adapter`.
    model.base_model._cast_adapter_dtype("default")
    assert dtypes() == {torch.float32}
    assert model(pixel_values.bfloat16()).logits.dtype == torch.float32
