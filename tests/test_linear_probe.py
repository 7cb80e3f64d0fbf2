"""Heads in closed form: what one reaches on the frozen model, and one that is fitted again after training."""

import pytest
import torch
from conftest import answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from train_image_classifier import compare

from pgn_peft.training import LinearProbe, linear_probe, refit_head

SCALE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_virtual_tokens": None}


def batches(count, seed):
    """Images whose class is the sign of their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    shift = (2.0 * labels - 1)[:, None, None, None]
    pixels = 0.3 * torch.randn(count, 3, 32, 32, generator=generator) + shift
    return [
        {"pixel_values": images, "labels": classes}
        for images, classes in zip(pixels.split(7), labels.split(7), strict=True)
    ]


@pytest.mark.parametrize("fields", [{"prompt_depth": "all"}, {"prompt_space": "pixel"} | SCALE], ids=str)
def test_a_linear_head_on_the_frozen_features(fields):
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(num_labels=2, **fields))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = linear_probe(model, batches(40, 0), batches(20, 1))
    assert_same(found, LinearProbe(linear=1.0, own=None))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    swapped = [batch | {"labels": 1 - batch["labels"]} for batch in batches(20, 1)]
    assert linear_probe(model, batches(40, 0), swapped).linear == 0


def test_the_models_own_head_through_the_mapping():
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(head="frozen", label_mapping=[3, 1]))).eval()
    evaluated = batches(20, 1)
    logits = answer(tiny_vit(), torch.cat([batch["pixel_values"] for batch in evaluated]))[:, [3, 1]]
    labels = torch.cat([batch["labels"] for batch in evaluated])
    expected = (logits.argmax(1) == labels).double().mean().item()
    assert_same(linear_probe(model, batches(40, 0), evaluated).own, expected)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="The model has no classification head"):
        linear_probe(get_peft_model(tiny_vit("ViTModel"), tiny_config()), batches(4, 0), batches(4, 0))


def test_a_head_that_is_fitted_again_is_kept_where_it_is_better():
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(num_labels=2))).train()
    pixels, labels = (torch.cat([batch[name] for batch in batches(20, 1)]) for name in ("pixel_values", "labels"))
    expected = (answer(model.eval(), pixels).argmax(1) == labels).double().mean().item()
    before = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    frozen = model.get_base_model().vit.eval()
    assert_same(refit_head(model, batches(40, 0), batches(20, 1)), (expected, 1.0))
    assert model.training
    assert not frozen.training
    assert (answer(model.eval(), pixels).argmax(1) == labels).all()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]
    assert [name.rpartition("pgn_head.")[2] for name in changed] == ["default.weight", "default.bias"]
    # Now it is right on all images: a head that is fitted to wrong labels is not kept.
    wrong = [batch | {"labels": 1 - batch["labels"]} for batch in batches(40, 0)]
    assert refit_head(model, wrong, batches(20, 1)) == (1.0, 0.0)
    assert (answer(model, pixels).argmax(1) == labels).all()


def test_a_head_of_the_model_cannot_be_fitted_again():
    model = get_peft_model(tiny_vit(), tiny_config(head="frozen", label_mapping=[3, 1]))
    with pytest.raises(ValueError, match="no linear head of its own"):
        refit_head(model, batches(4, 0), batches(4, 0))


def test_the_script_says_what_prompts_add():
    assert "prompts add nothing here" in compare(0.81, LinearProbe(0.80), None, 400)
    assert compare(0.90, LinearProbe(0.80), None, 400) == "+0.100 compared with a linear head without prompts"
    assert "-0.100" in compare(0.70, LinearProbe(0.80), None, 400)
    needed = compare(0.90, LinearProbe(0.80), 0.85, 400).splitlines()
    assert needed[1] == "+0.050 compared with the prompts of other images"
    assert "--generator static is smaller" in compare(0.90, LinearProbe(0.80), 0.895, 400)
