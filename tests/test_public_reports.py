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
