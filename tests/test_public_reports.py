"""Faults that users of PEFT, Transformers and datasets have reported, tried here; each test names its report."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainingArguments

from pgn_peft import AdapterTrainer, ImageCollator

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

NAMES = {0: "cat", 1: "dog"}
SCRIPT_ARGUMENTS = ["--model_name_or_path", "path/to/vit", "--output_dir", "path/to/adapter", "--use_cpu"]


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


def first_gradient_norm(folder, batch_size, accumulated, labels, **overrides):
    """Train for one step on eight images, and return the norm of its gradient."""
    torch.manual_seed(0)
    config = tiny_config(num_labels=len(labels[0]), generator_norm="group")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, max_steps=1,
        logging_steps=1, max_grad_norm=1e9, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = AdapterTrainer(
        get_peft_model(tiny_vit(), config),
        arguments,
        train_dataset=[{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)],
        data_collator=ImageCollator(num_labels=len(labels[0])),
        **overrides,
    )
    trainer.train()
    return trainer.state.log_history[0]["grad_norm"]


def test_a_loss_function_of_the_users_is_told_the_number_of_labels(tmp_path):
    """huggingface/transformers#34198: without it accumulated gradients are too large."""

    def loss_function(outputs, labels, num_items_in_batch):
        loss = binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum")
        return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    labels = [[float(n % 2), float(n % 3 == 0)] for n in range(8)]
    at_once, accumulated = (
        first_gradient_norm(tmp_path, batch_size, 8 // batch_size, labels, compute_loss_func=loss_function)
        for batch_size in (8, 2)
    )
    assert accumulated == pytest.approx(at_once, rel=1e-4)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluations_that_would_round_the_weights_are_refused(name, tmp_path):
    """huggingface/transformers#10268: the weights stay rounded afterwards, the frozen ones too, and are saved so."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **{name: True})
    with pytest.raises(ValueError, match=f"`{name}` must be False, but got True.* rounds the weights.*Use .*16=True"):
        AdapterTrainer(adapted(), arguments)


def test_the_script_evaluates_all_images():
    """huggingface/transformers#9662: `dataloader_drop_last` leaves images out of evaluations too."""
    from train_image_classifier import main

    with pytest.raises(SystemExit, match="`dataloader_drop_last` must be False, but got True"):
        main([*SCRIPT_ARGUMENTS, "--dataset", "path/to/images", "--dataloader_drop_last", "true"])
