"""Faults that users of PEFT, Transformers and other libraries have reported; each test names its report."""

import copy

import pytest
import torch
from conftest import answer, assert_nearly_equal, move_adapter, tiny_config, tiny_vit
from datasets import ClassLabel, Dataset, Features, config
from datasets import Image as ImageColumn
from image_data import add_transforms
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch.ao.quantization import quantize_dynamic
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel.replicate import replicate
from torch.optim.swa_utils import AveragedModel, update_bn
from train_image_classifier import Arguments, main, make_trainer
from transformers import TrainingArguments, ViTImageProcessor

from pgn_peft import AdapterTrainer, ImageCollator, make_prompter

NAMES = {0: "cat", 1: "dog"}
PIXELS = {"prompt_space": "pixel", "image_size": 32, "num_virtual_tokens": None}
PIXELS |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
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


def first_gradient_norm(folder, batch_size, accumulated, labels, label_smoothing_factor=0.0, **overrides):
    """Train for one step on eight images, and return the norm of its gradient."""
    torch.manual_seed(0)
    config = tiny_config(num_labels=2, generator_norm="group")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, max_steps=1,
        logging_steps=1, max_grad_norm=1e9, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, label_smoothing_factor=label_smoothing_factor,
    )  # fmt: skip
    trainer = AdapterTrainer(
        get_peft_model(tiny_vit(), config),
        arguments,
        train_dataset=[{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)],
        data_collator=ImageCollator(num_labels=2),
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
    with pytest.raises(SystemExit, match="`dataloader_drop_last` would leave images out"):
        main([*SCRIPT_ARGUMENTS, "--dataset", "path/to/images", "--dataloader_drop_last", "true"])


def test_a_data_set_of_one_class_is_refused(tmp_path, monkeypatch):
    """huggingface/transformers#45611: one label is no classification; here it became a regression, 100 % accurate."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat"])})
    tmp_path.joinpath("images").mkdir()
    rows = {"image": [Image.new("RGB", (8, 8))] * 20, "label": [0] * 20}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "images" / "train.parquet"))
    with pytest.raises(SystemExit, match=r"`dataset` has one class, \['cat'\]"):
        main([*SCRIPT_ARGUMENTS, "--dataset", str(tmp_path / "images"), "--output_dir", str(tmp_path / "adapter")])


def test_a_prompter_of_images_that_no_file_holds_is_refused():
    """huggingface/transformers#21981: images of other than 1, 3 or 4 channels ended in a KeyError."""
    scale = {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}
    config = tiny_config(prompt_space="pixel", image_size=32, num_virtual_tokens=None, id2label=NAMES, **scale)
    model = get_peft_model(tiny_vit(num_channels=2), config).eval()
    assert answer(model, torch.zeros(1, 2, 32, 32)).shape == (1, 2)
    with pytest.raises(ValueError, match="`num_channels` must be one of 1, 3, 4 .*, but got 2"):
        make_prompter(model, ViTImageProcessor(size={"height": 32, "width": 32}, **scale))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_another_backbone_brings_all_that_follows_from_it(assign, pixel_values):
    """pytorch/pytorch#105233: buffers that are not saved stay those of the backbone that the model was made with."""
    model = adapted(**PIXELS)
    other = get_peft_model(tiny_vit(seed=1), tiny_config(id2label=NAMES, **PIXELS)).eval()
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state_dict, assign=assign)
    assert torch.equal(answer(other, pixel_values), answer(model, pixel_values))
    directions = other.get_base_model().vit.embeddings.pgn_library["default"].directions
    adapter_alone = {name: tensor for name, tensor in state_dict.items() if ".pgn_" in name}
    other.load_state_dict(adapter_alone, strict=False)
    assert other.get_base_model().vit.embeddings.pgn_library["default"].directions is directions  # a second's work


def test_training_a_frozen_adapter_is_refused_in_words(tmp_path):
    """huggingface/peft#1340: `from_pretrained` freezes it, and torch said that "element 0 does not require grad"."""
    adapted().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}] * 2
    with pytest.raises(ValueError, match="`model` must have trainable parameters, .*is_trainable=True"):
        AdapterTrainer(frozen, arguments, train_dataset=rows, data_collator=ImageCollator(num_labels=2)).train()


def test_the_script_evaluates_a_base_that_answers_with_hidden_states(tmp_path):
    """huggingface/transformers#30104: its predictions were a tuple, which numpy could not read."""
    base = tiny_vit()
    base.config.output_hidden_states = True
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"image": [Image.new("RGB", (32, 32))] * 2, "label": [0, 1]}, features=features)
    splits = {"train": rows, "validation": rows}
    add_transforms(splits, ViTImageProcessor(size={"height": 32, "width": 32}))
    arguments = Arguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = make_trainer(get_peft_model(base, tiny_config(id2label=NAMES)), splits, arguments)
    assert trainer.evaluate()["eval_accuracy"] == 0.5


def test_label_smoothing_gives_accumulated_batches_the_gradient_of_one(tmp_path):
    """huggingface/transformers#46731: gradients were multiplied by the number of batches."""
    labels = [n % 2 for n in range(8)]
    at_once, accumulated, plain = (
        first_gradient_norm(tmp_path, batch_size, 8 // batch_size, labels, factor)
        for batch_size, factor in [(8, 0.2), (2, 0.2), (8, 0.0)]
    )
    assert accumulated == pytest.approx(at_once, rel=1e-4) != pytest.approx(plain, rel=1e-2)


def test_label_smoothing_of_several_labels_is_refused_in_words(tmp_path):
    """huggingface/transformers#40258: torch failed in gather(), also here, where `problem_type` is not set."""
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0 for labels that are numbers .* got 0.1"):
        first_gradient_norm(tmp_path, 8, 1, [[0.0, 1.0]] * 8, 0.1)


def test_a_trainer_takes_model_init_in_place_of_a_model(tmp_path):
    """adapter-hub/adapters#481: it needed a model too; hyperparameter searches have none (huggingface/peft#914)."""
    made = []

    def model_init():
        made.append(get_peft_model(tiny_vit(), tiny_config(id2label=NAMES)))
        return made[-1]

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": label} for label in (0, 1)]
    collator = ImageCollator(num_labels=2)
    trainer = AdapterTrainer(args=arguments, model_init=model_init, train_dataset=rows, data_collator=collator)
    trainer.train()
    first, trained = (model.get_base_model().classifier.pgn_head["default"].weight for model in made)
    assert trainer.model is made[1]
    assert not torch.equal(first, trained)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch recommends torchao
@pytest.mark.parametrize("config", [{}, {"generator_rank": 2}, {"generator": "static"}, PIXELS])
def test_a_dynamically_quantised_model_answers(config, pixel_values):
    """huggingface/transformers#21839: the dtype was read from `weight`, a method of a quantised linear layer."""
    model = adapted(**config)
    expected = answer(model, pixel_values)
    found = answer(quantize_dynamic(model, {torch.nn.Linear}), pixel_values)
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()  # int8 in so small a network


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_loaded_for_an_evaluation_can_be_trained_afterwards(mode, pixel_values):
    """huggingface/diffusers#1658: tensors that were made in inference mode "cannot be saved for backward"."""
    model = adapted(**PIXELS)
    with mode():
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    shifts = model.get_base_model().vit.embeddings.pgn_library["default"].token_shifts
    model.train()(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert shifts.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_takes_a_state_dict(dtype, pixel_values):
    """huggingface/transformers#22888: a constant stayed in float32 beside weights that had been cast."""
    model = adapted(**PIXELS)
    expected = answer(model, pixel_values)
    model.to(dtype).load_state_dict(copy.deepcopy(model.state_dict()))
    found = answer(model, pixel_values)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("config", [{}, {"prompt_depth": None}, PIXELS])
def test_averaged_weights_are_their_average_with_statistics_of_their_own(config, pixel_values, tmp_path):
    """Lightning-AI/pytorch-lightning#14866: BatchNorm's statistics of averaged weights were wrong."""
    model = adapted(**config)
    averaged = AveragedModel(model)
    first = copy.deepcopy(model.state_dict())
    averaged.update_parameters(model)
    averaged.update_parameters(move_adapter(model, seed=2))
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, (first[name] + model.state_dict()[name]) / 2)
    before = answer(model, pixel_values)
    update_bn([pixel_values, 2 * pixel_values], averaged)
    trunk = averaged.module.get_base_model().vit.embeddings.pgn_generator["default"].trunk
    features = trunk.stem_conv(torch.cat([pixel_values, 2 * pixel_values]))
    torch.testing.assert_close(trunk.stem_norm.running_mean, features.mean(dim=(0, 2, 3)))
    assert torch.equal(answer(model, pixel_values), before)
    averaged.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    assert_nearly_equal(
        answer(loaded, pixel_values), answer(averaged.eval(), pixel_values), valid_pixels=config == PIXELS
    )


@pytest.mark.parametrize("config", [{}, {"prompt_depth": None}, PIXELS])
def test_replicas_have_the_gradients_of_one_model(config, pixel_values, monkeypatch):
    """pytorch/pytorch#40457, adapter-hub/adapters#650: replicas of `DataParallel` list no parameters."""

    def copies(tensors, devices, detach=False):
        return [[tensor.view_as(tensor) for tensor in tensors] for _ in devices]

    # Torch's own needs GPUs. The function hides the module of its name.
    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", copies)
    model, labels = adapted(**config), torch.tensor([0, 1, 0, 1])
    gradients = []
    for number in (1, 2):
        model.zero_grad()
        parts = zip(replicate(model, [0] * number), pixel_values.chunk(number), labels.chunk(number), strict=True)
        torch.stack([replica(images, labels=part).loss for replica, images, part in parts]).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    model.zero_grad()
    model(pixel_values, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        for found in gradients:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_an_adapter_leaves_the_active_one_as_trainable_as_before(is_trainable, pixel_values, tmp_path):
    """huggingface/peft#3580, #2928: a frozen adapter came to be trained in place of the one that was loaded for it."""
    adapted(modules_to_save=["vit.layernorm"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=is_trainable)
    names = {name for name, _ in model.named_parameters() if ".default." in name}
    assert trainable(model) == (names if is_trainable else set())
    model.load_adapter(tmp_path, "other", is_trainable=not is_trainable)
    others = {name.replace(".default.", ".other.") for name in names}
    assert trainable(model) == (names if is_trainable else others)
    model.set_adapter("other", inference_mode=True)
    assert trainable(model) == set()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(pixel_values)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


def test_an_adapter_in_channels_last_is_saved_as_any_other(pixel_values, tmp_path):
    """safetensors/safetensors#308: tensors that were not contiguous could not be saved."""
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "channels_last")
    plain, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "channels_last"))
    assert plain.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "channels_last").eval()
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
