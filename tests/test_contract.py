"""What PEFT promises its users: on ViT in every form of the method, on each other architecture in one form."""

import peft
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    CLASSIFIERS,
    PIXEL,
    answer,
    assert_same,
    embed,
    embeddings_of,
    move_adapter,
    refused,
    tiny_config,
    tiny_vit,
)
from peft import PeftModel, get_peft_model

from pgn_peft import PGNConfig

# name -> what makes it so
FORMS = {
    "generated": {},
    "factorised": {"generator_rank": 2, "static_prompts": True},
    "static": {"generator": "static"},
    "deep": {"prompt_depth": "all", "static_prompts": True},
    "deep and static": {"prompt_depth": 2, "generator": "static"},
    "pixel": PIXEL,
    "tile": PIXEL | {"generator": "static"},
}
forms = pytest.mark.parametrize("form", FORMS)

THREE = dict(enumerate(["cat", "dog", "owl"]))


def adapted(base="ViTForImageClassification", seed=1, **overrides):
    """Adapt a model, or a new one of an architecture."""
    base = tiny_vit(base) if isinstance(base, str) else base
    if type(base).__name__ in CLASSIFIERS:
        overrides = {"id2label": THREE} | overrides
    return move_adapter(get_peft_model(base, tiny_config(**overrides)), seed).eval()


def tensors_of_base(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "pgn_" not in name}


def train(model, architecture, pixel_values):
    """Train for three steps; assert that every weight of the adapter changed and no tensor of the base did."""
    frozen = tensors_of_base(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("pgn_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        if architecture in CLASSIFIERS:
            loss = model(pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss
        else:
            loss = model(pixel_values).last_hidden_state[:, 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(model.state_dict()[name], before), f"frozen {name} changed"
    for name, before in trained.items():
        assert not torch.equal(dict(model.named_parameters())[name], before), f"{name} was not trained"


def read_out(outputs):
    """What is read of logits or features: of the latter, token 0."""
    return outputs[:, 0] if outputs.ndim == 3 else outputs


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "ViTForImageClassification"])
def test_every_other_architecture_in_one_form(architecture, pixel_values, tmp_path):
    """With prompts in each layer: adapted, switched off, trained, saved, loaded and unloaded."""
    base = tiny_vit(architecture)
    before, structure = answer(base, pixel_values), str(base)
    model = get_peft_model(base, tiny_config(prompt_depth="all")).eval()
    # A head starts as a copy of the model's, so that prompts alone make the difference.
    assert (read_out(answer(model, pixel_values)) - read_out(before)).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
    train(move_adapter(model).train(), architecture, pixel_values)
    expected = answer(model.eval(), pixel_values)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(architecture), tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert_same(answer(loaded, pixel_values), expected)
    unloaded = model.unload()
    assert torch.equal(answer(unloaded, pixel_values), before)
    assert str(unloaded) == structure


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name].get("prompt_space") != "pixel"])
def test_prompts_are_appended_and_change_the_answer(form, pixel_values):
    base = tiny_vit()
    tokens, before = embed(base, pixel_values), answer(base, pixel_values)
    model = move_adapter(get_peft_model(base, tiny_config(**FORMS[form]))).eval()
    prompted = embed(model, pixel_values)
    assert_same(prompted[:, : tokens.shape[1]], tokens)
    assert_same(prompted[:, tokens.shape[1] :], embeddings_of(model).prompts("default", pixel_values))
    assert prompted.shape[1] == tokens.shape[1] + 3 * (2 if "deep" in form else 1)
    assert (answer(model, pixel_values) - before).abs().max() > 1e-3


@forms
def test_adapters_off_and_unloaded_it_is_the_base_bit_for_bit(form, pixel_values):
    base = tiny_vit()
    before, structure, labels = answer(base, pixel_values), str(base), dict(base.config.id2label)
    model = adapted(base, **FORMS[form])
    on = answer(model, pixel_values)
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
    assert torch.equal(answer(model, pixel_values), on)
    unloaded = model.unload()
    assert torch.equal(answer(unloaded, pixel_values), before)
    assert str(unloaded) == structure
    assert unloaded.config.id2label == labels
    assert not unloaded.base_model._forward_pre_hooks
    assert not hasattr(unloaded, "peft_config")


@forms
def test_training_changes_every_adapter_weight_and_nothing_of_the_base(form, pixel_values):
    train(adapted(**FORMS[form]).train(), "ViTForImageClassification", pixel_values)


@forms
def test_save_and_load_under_another_name(form, pixel_values, tmp_path):
    model = adapted(**FORMS[form])
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path)
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {file.name for file in tmp_path.iterdir()} == files
    saved = {name: t for name, t in model.state_dict().items() if "pgn_" in name}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_vit(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert_same(answer(loaded, pixel_values), expected, valid_pixels="prompt_space" in FORMS[form])
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(module.training for module in loaded.modules())
        for name, tensor in saved.items():  # running statistics included
            assert torch.equal(loaded.state_dict()[name.replace(".default.", ".other.")], tensor), name


def test_merging_is_refused():
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter, embeddings_of(model).merge):
        with refused(ValueError, "merged"):
            merge()
    model.unmerge_adapter()  # nothing is ever merged


def test_adapters_with_different_labels_share_a_backbone(pixel_values, tmp_path):
    first = adapted(seed=1)
    second = adapted(seed=2, id2label=dict(enumerate("ab")), prompt_depth="all", num_virtual_tokens=5)
    expected = {"first": answer(first, pixel_values), "second": answer(second, pixel_values)}
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")

    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name, names in [("second", "ab"), ("first", THREE.values()), ("second", "ab")]:
        model.set_adapter(name)
        assert_same(answer(model, pixel_values), expected[name])
        assert list(model.config.id2label.values()) == list(names)
        assert model.config.num_labels == len(names)
        assert model.config.label2id == {label: index for index, label in enumerate(names)}
    with model.disable_adapter():
        assert model.config.num_labels == 5
    assert model.config.num_labels == 2

    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert_same(answer(model, pixel_values), expected["first"])
    assert model.config.num_labels == 3
    assert not any(".second." in name for name in model.state_dict())


def test_several_active_adapters_concatenate_and_the_first_ones_head_answers(pixel_values):
    model = adapted()
    model.add_adapter("more", tiny_config(id2label=dict(enumerate("ab")), num_virtual_tokens=2))
    move_adapter(model, seed=3).eval()
    with model.disable_adapter():
        plain = embed(model, pixel_values)
    for active, width in ([["default", "more"], 3], [["more", "default"], 2]):
        model.base_model.set_adapter(active)
        prompts = [embeddings_of(model).prompts(name, pixel_values) for name in active]
        assert_same(embed(model, pixel_values), torch.cat([plain, *prompts], dim=1))
        assert answer(model, pixel_values).shape[1] == width
        assert model.config.num_labels == width
    assert model.base_model.active_adapters == ["more", "default"]
    with refused(ValueError, "mroe"):
        model.base_model.set_adapter(["more", "mroe"])


def test_adding_an_adapter_to_a_model_in_eval_mode_changes_nothing(pixel_values):
    model = adapted()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = answer(model, pixel_values)
    model.add_adapter("second", tiny_config())
    assert torch.equal(answer(model, pixel_values), expected)
    assert not any(module.training for module in model.modules())
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("second")
    answer(model, pixel_values)
    assert all(t == 0 for name, t in model.state_dict().items() if ".second." in name and "batches_tracked" in name)
    assert all((".second." in name) == p.requires_grad for name, p in model.named_parameters() if "pgn_" in name)
    model.train().add_adapter("third", tiny_config())
    assert all(module.training for name, module in model.named_modules() if "pgn_" in name)


def test_a_frozen_adapter_keeps_its_statistics_in_train_mode(pixel_values, tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model(pixel_values)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_status_and_trainable_parameters(capsys):
    model = adapted()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    own = sum(size for name, size in sizes.items() if "pgn_" in name)
    model.print_trainable_parameters()
    total = sum(sizes.values())
    expected = f"trainable params: {own:,d} || all params: {total:,d} || trainable%: {100 * own / total:.4f}"
    assert capsys.readouterr().out.strip() == expected
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers, status.enabled) == ({"default": "PGN"}, 2, True)
    assert (status.active_adapters, status.available_adapters, status.merged_adapters) == (
        ["default"],
        ["default"],
        [],
    )
    assert status.requires_grad == {"default": True}
    model.add_adapter("second", tiny_config(head="frozen", generator="static"))
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert [layer.name for layer in model.get_layer_status()] == ["model.vit.embeddings", "model.classifier"]
    assert model.get_model_status().available_adapters == ["default", "second"]
    assert model.get_model_status().active_adapters == ["default"]


def test_deleting_the_active_adapter_leaves_all_layers_with_the_same_one(pixel_values):
    base = tiny_vit()
    before = answer(base, pixel_values)
    model = adapted(base)
    # "b" has no head of its own, so the two layers could disagree on what comes next.
    model.add_adapter("b", tiny_config(head="frozen"))
    model.add_adapter("c", tiny_config(id2label=dict(enumerate("xy"))))
    with pytest.warns(UserWarning, match="default was active"):
        model.delete_adapter("default")
    assert model.get_model_status().active_adapters == ["b"]
    assert answer(model, pixel_values).shape[1] == 5
    with pytest.warns(UserWarning, match="b was active"):
        model.delete_adapter("b")
    assert model.config.id2label == {0: "x", 1: "y"}
    model.delete_adapter("c")
    assert base.config.num_labels == 5
    assert torch.equal(answer(base, pixel_values), before)
    assert torch.equal(answer(model.unload(), pixel_values), before)


def test_one_config_serves_several_models():
    config = tiny_config()
    small = get_peft_model(tiny_vit(num_labels=3), config)
    large = get_peft_model(tiny_vit(num_labels=7, hidden_size=64), config)
    assert (small.config.num_labels, large.config.num_labels) == (3, 7)


def test_further_modules_are_trained_and_saved(pixel_values, tmp_path):
    model = get_peft_model(tiny_vit(), tiny_config(modules_to_save=["vit.layernorm"]))
    move_adapter(model).eval()
    with torch.no_grad():
        model.get_base_model().vit.layernorm.modules_to_save["default"].weight.mul_(2)
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path)
    base = tiny_vit()
    before = answer(base, pixel_values)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_same(answer(loaded, pixel_values), expected)
    assert torch.equal(answer(loaded.unload(), pixel_values), before)


def test_inject_adapter_in_model_and_its_state_dict(pixel_values):
    model = adapted()
    state_dict = peft.get_peft_model_state_dict(model)
    plain = tiny_vit()
    peft.inject_adapter_in_model(tiny_config(id2label=THREE), plain, adapter_name="mine")
    peft.set_peft_model_state_dict(plain, state_dict, adapter_name="mine")
    assert_same(answer(plain, pixel_values), answer(model, pixel_values))
    from_names = tiny_vit()
    peft.inject_adapter_in_model(
        tiny_config(id2label=THREE),
        from_names,
        state_dict={name.removeprefix("base_model.model."): tensor for name, tensor in state_dict.items()},
    )
    assert from_names.config.num_labels == 3


@pytest.mark.parametrize("trainable", [False, True])
def test_a_config_that_an_adapter_is_loaded_with_stays_the_callers_object(trainable, tmp_path, pixel_values):
    model = adapted()
    model.save_pretrained(tmp_path)
    config = PGNConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, config=config, is_trainable=trainable)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode is not trainable
    assert_same(answer(loaded.eval(), pixel_values), answer(model, pixel_values))


def test_a_config_without_records_gets_them_when_an_adapter_is_loaded_and_keeps_none_when_that_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = tiny_config(id2label=THREE)
    with refused(TypeError, "Linear"):
        PeftModel.from_pretrained(torch.nn.Linear(2, 2), tmp_path, config=config)
    assert config.hidden_size is None
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.hidden_size == 32


# With wrapped embeddings and head alone, around the last layer, and around all layers.
wrapped = pytest.mark.parametrize(
    ("architecture", "depth"),
    [("ViTForImageClassification", 1), ("Dinov2ForImageClassification", 1), ("CLIPForImageClassification", None)],
)


@wrapped
def test_the_base_models_state_dict_has_its_own_names(architecture, depth):
    expected = tiny_vit(architecture).state_dict()
    model = adapted(architecture, prompt_depth=depth)
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = tiny_vit(architecture, seed=7).state_dict()
    peft.set_base_model_state_dict(model, other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in peft.get_base_model_state_dict(model).items())


@wrapped
@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_all_wrapped_layers_report_one_state(architecture, depth):
    model = adapted(architecture, prompt_depth=depth)

    def state():
        status = model.get_model_status()
        return status.enabled, status.active_adapters, status.available_adapters

    assert state() == (True, ["default"], ["default"])
    model.add_adapter("second", tiny_config())
    model.set_adapter("second")
    assert state() == (True, ["second"], ["default", "second"])
    with model.disable_adapter():
        model.add_adapter("deep", tiny_config(prompt_depth=2))
        assert state() == (False, ["second"], ["deep", "default", "second"])
    model.set_adapter("default")
    model.delete_adapter("default")
    assert state() == (True, ["deep"], ["deep", "second"])
