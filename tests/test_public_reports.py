"""Faults that users of PEFT, Transformers and datasets have reported, tried here; each test names its report."""

import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model

NAMES = {0: "cat", 1: "dog"}


def adapted(**overrides):
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(**({"id2label": NAMES} | overrides)))).eval()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_that_were_off_for_a_while_are_as_frozen_as_before(pixel_values, tmp_path):
    """huggingface/peft#3447: a frozen adapter came back trainable; here its BatchNorm would move too."""
    model = adapted()
    before = trainable(model)
    with model.disable_adapter():
        pass
    assert trainable(model) == before != set()
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    tensors = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    with frozen.disable_adapter():
        assert torch.equal(answer(frozen, pixel_values), answer(tiny_vit(), pixel_values))
    assert trainable(frozen) == set()
    frozen.train()(pixel_values)
    for name, tensor in tensors.items():
        assert torch.equal(frozen.state_dict()[name], tensor), name


def test_an_adapter_that_follows_a_deleted_one_has_its_own_modules(pixel_values):
    """huggingface/peft#3716: it had the base's in their place, frozen, if the deleted adapter had none."""
    model = get_peft_model(tiny_vit(), tiny_config(id2label=NAMES, modules_to_save=["vit.layernorm"]))
    move_adapter(model).eval()
    with torch.no_grad():
        model.get_base_model().vit.layernorm.modules_to_save["default"].weight.mul_(2)
    expected, before = answer(model, pixel_values), trainable(model)
    model.add_adapter("second", tiny_config(id2label=NAMES))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(answer(model, pixel_values), expected)
    assert trainable(model) == before
