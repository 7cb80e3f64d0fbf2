"""Faults that users of PEFT, Transformers and other libraries have reported; each test names its report."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
import transformers
from conftest import answer, assert_nearly_equal, edit_json, move_adapter, tiny_config, tiny_vit
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from image_data import add_transforms
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.ao.quantization import quantize_dynamic
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel.replicate import replicate
from torch.optim.swa_utils import AveragedModel, update_bn
from train_image_classifier import Arguments, main, make_trainer
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
)

from pgn_peft import AdapterTrainer, Classifier, ImageCollator, load_classifier, make_prompter

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
        assert_nearly_equal(answer(frozen, pixel_values), answer(tiny_vit(), pixel_values))
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
    assert_nearly_equal(answer(model, pixel_values), expected)
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


def sum_over_labels(outputs, labels, num_items_in_batch):
    loss = binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum")
    return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([[float(n % 2), float(n % 3 == 0)] for n in range(8)], {"compute_loss_func": sum_over_labels}),
        ([n % 2 for n in range(8)], {"label_smoothing_factor": 0.2}),
    ],
    ids=["loss function", "label smoothing"],
)
def test_accumulated_batches_have_the_gradient_of_one(labels, options, tmp_path):
    """huggingface/transformers#34198, #46731: gradients were multiplied by the number of batches."""
    at_once, accumulated = (first_gradient_norm(tmp_path, size, 8 // size, labels, **options) for size in (8, 2))
    assert accumulated == pytest.approx(at_once, rel=1e-4)


def test_evaluations_that_would_round_the_weights_are_refused(tmp_path):
    """huggingface/transformers#10268: the weights stay rounded afterwards, the frozen ones too, and are saved so."""
    for name in ("bf16_full_eval", "fp16_full_eval"):
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **{name: True})
        with pytest.raises(ValueError, match=name):
            AdapterTrainer(adapted(), arguments)


def test_the_script_evaluates_all_images():
    """huggingface/transformers#9662: `dataloader_drop_last` leaves images out of evaluations too."""
    with pytest.raises(SystemExit, match="dataloader_drop_last"):
        main([*SCRIPT_ARGUMENTS, "--dataset", "path/to/images", "--dataloader_drop_last", "true"])


def test_a_data_set_of_one_class_is_refused(tmp_path, monkeypatch):
    """huggingface/transformers#45611: one label is no classification; here it became a regression, 100 % accurate."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat"])})
    tmp_path.joinpath("images").mkdir()
    rows = {"image": [Image.new("RGB", (8, 8))] * 20, "label": [0] * 20}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "images" / "train.parquet"))
    with pytest.raises(SystemExit, match=r"\['cat'\]"):
        main([*SCRIPT_ARGUMENTS, "--dataset", str(tmp_path / "images"), "--output_dir", str(tmp_path / "adapter")])


def test_a_prompter_of_images_that_no_file_holds_is_refused():
    """huggingface/transformers#21981: images of other than 1, 3 or 4 channels ended in a KeyError."""
    scale = {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}
    config = tiny_config(prompt_space="pixel", image_size=32, num_virtual_tokens=None, id2label=NAMES, **scale)
    model = get_peft_model(tiny_vit(num_channels=2), config).eval()
    assert answer(model, torch.zeros(1, 2, 32, 32)).shape == (1, 2)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        make_prompter(model, ViTImageProcessor(size={"height": 32, "width": 32}, **scale))


def test_a_state_dict_with_another_backbone_brings_all_that_follows_from_it(pixel_values):
    """pytorch/pytorch#105233: buffers that are not saved stay those of the backbone that the model was made with."""
    model = adapted(**PIXELS)
    for assign in (False, True):
        other = get_peft_model(tiny_vit(seed=1), tiny_config(id2label=NAMES, **PIXELS)).eval()
        state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        other.load_state_dict(state_dict, assign=assign)
        assert_nearly_equal(answer(other, pixel_values), answer(model, pixel_values), valid_pixels=True)
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
    with pytest.raises(ValueError, match="is_trainable=True"):
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
@pytest.mark.parametrize("config", [{"generator_rank": 2}, PIXELS])
def test_a_dynamically_quantised_model_answers(config, pixel_values):
    """huggingface/transformers#21839: the dtype was read from `weight`, a method of a quantised linear layer."""
    model = adapted(**config)
    expected = answer(model, pixel_values)
    found = answer(quantize_dynamic(model, {torch.nn.Linear}), pixel_values)
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()  # int8 in so small a network


def test_weights_loaded_for_an_evaluation_can_be_trained_afterwards(pixel_values):
    """huggingface/diffusers#1658: tensors that were made in inference mode "cannot be saved for backward"."""
    model = adapted(**PIXELS)
    with torch.inference_mode():
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    shifts = model.get_base_model().vit.embeddings.pgn_library["default"].token_shifts
    model.train()(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert shifts.grad.abs().max() > 0


def test_a_cast_model_takes_a_state_dict(pixel_values):
    """huggingface/transformers#22888: a constant stayed in float32 beside weights that had been cast."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = adapted(**PIXELS)
        expected = answer(model, pixel_values)
        model.to(dtype).load_state_dict(copy.deepcopy(model.state_dict()))
        found = answer(model, pixel_values)
        assert found.dtype == dtype
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("config", [{"prompt_depth": "all"}, PIXELS])
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
    assert_nearly_equal(answer(model, pixel_values), before, valid_pixels=config == PIXELS)
    averaged.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    assert_nearly_equal(
        answer(loaded, pixel_values), answer(averaged.eval(), pixel_values), valid_pixels=config == PIXELS
    )


@pytest.mark.parametrize("config", [{"prompt_depth": "all"}, PIXELS])
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


def saved_classifier(folder, **overrides):
    """Save a classifier, the norm before its head trained along, and return the model and the adapter's folder."""
    tiny_vit().save_pretrained(folder / "base")
    base = ViTForImageClassification.from_pretrained(folder / "base")
    config = tiny_config(**({"id2label": NAMES, "modules_to_save": ["vit.layernorm"]} | overrides))
    model = move_adapter(get_peft_model(base, config)).eval()
    if config.modules_to_save:
        with torch.no_grad():
            model.get_base_model().vit.layernorm.modules_to_save["default"].weight.mul_(torch.linspace(0.2, 3, 32))
    Classifier(model, ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(folder / "adapter")
    return model, folder / "adapter"


def loaded_everywhere(adapter):
    """Load an adapter by PEFT, by Transformers and by this package."""
    yield PeftModel.from_pretrained(tiny_vit(), adapter)
    yield AutoModelForImageClassification.from_pretrained(adapter)
    yield load_classifier(adapter).model


def test_modules_that_were_trained_along_are_restored_by_every_loader(pixel_values, tmp_path):
    """huggingface/transformers#48595, #34469: one loader left them as in the base, and the model in training mode."""
    model, adapter = saved_classifier(tmp_path)
    for loaded in loaded_everywhere(adapter):
        assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
        assert not any(module.training for module in loaded.modules())


def test_weights_without_metadata_are_loaded(pixel_values, tmp_path):
    """safetensors/safetensors#549: tools that write a file anew leave out the metadata that loaders asked for."""
    model, adapter = saved_classifier(tmp_path, modules_to_save=None)
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    with safe_open(weights, "pt") as file:
        assert file.metadata() is None
    edit_json(adapter / "adapter_config.json")
    for loaded in loaded_everywhere(adapter):
        assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))


def test_classes_are_numbered_by_their_keys_in_whatever_order_a_file_has_them(pixel_values, tmp_path):
    """huggingface/datasets#5277, MIC-DKFZ/nnUNet#607: keys are strings in JSON, and "10" is sorted before "2"."""
    names = {number: f"class {number}" for number in range(12)}
    _, adapter = saved_classifier(tmp_path, id2label=names)
    as_strings = {str(number): name for number, name in names.items()}
    edit_json(adapter / "adapter_config.json", id2label=dict(sorted(as_strings.items())))
    for loaded in loaded_everywhere(adapter):
        assert [*loaded.config.id2label.items()] == [*names.items()]
        assert loaded.config.label2id == {name: number for number, name in names.items()}


def test_adapters_stay_off_until_the_outer_block_ends(pixel_values):
    """huggingface/peft#3507, #367: an inner block turned them on again, and an error left them off."""
    model, base = adapted(), answer(tiny_vit(), pixel_values)
    expected = answer(model, pixel_values)
    with suppress(KeyError), model.disable_adapter():
        with model.disable_adapter():
            pass
        assert_nearly_equal(answer(model, pixel_values), base)
        raise KeyError
    assert_nearly_equal(answer(model, pixel_values), expected)
    assert model.config.id2label == NAMES


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_are_recomputed_as_they_were_computed(use_reentrant, pixel_values):
    """huggingface/peft#2832, adapter-hub/adapters#732, facebookresearch/fairscale#1035.

    With gradient checkpointing, layers were recomputed with whichever adapter was active by then, and BatchNorm's
    statistics were updated twice.
    """
    labels, results = torch.tensor([0, 1, 0, 1]), []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_vit(), tiny_config(id2label=NAMES, prompt_depth="all"))
        model.add_adapter("longer", tiny_config(id2label=NAMES, num_virtual_tokens=5))
        model.add_adapter("pixel", tiny_config(id2label=NAMES, **PIXELS))
        move_adapter(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        losses = []
        for name in ("default", "longer", "pixel"):
            model.set_adapter(name)
            losses.append(model(pixel_values, labels=labels).loss)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".pgn_" in name)
        with model.disable_adapter():
            answer(model, pixel_values)
            sum(losses).backward()
        results.append((model, dict(model.named_buffers())))
    (plain, statistics), (checkpointed, statistics_found) = results
    torch.testing.assert_close(statistics_found, statistics)
    found = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".pgn_" in name:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(found[name].grad, parameter.grad)


@pytest.mark.slow
def test_a_compiled_model_follows_the_switch(pixel_values):
    """meta-pytorch/torchtune#721, huggingface/diffusers#11408: it went on as it was when it was compiled."""
    torch.compiler.reset()
    static = {"generator": "static"}  # which compiles in a moment
    model = get_peft_model(tiny_vit(num_hidden_layers=1), tiny_config(id2label=NAMES, **static))
    model.add_adapter("second", tiny_config(id2label={0: "rose"}, num_virtual_tokens=5, **static))
    move_adapter(model).eval()
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert_nearly_equal(answer(compiled, pixel_values), answer(model, pixel_values))
    with model.disable_adapter():
        assert_nearly_equal(answer(compiled, pixel_values), answer(model, pixel_values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch recommends export
def test_a_traced_model_answers_for_any_number_of_images(pixel_values):
    """huggingface/peft#1419, #259: what was traced failed, or kept the size of the example."""
    for config in ({"prompt_depth": "all"}, PIXELS):
        model = adapted(**config)
        traced = torch.jit.trace(model, (pixel_values[:2],), strict=False, check_trace=False)
        for images in (pixel_values[:1], pixel_values):
            assert_nearly_equal(traced(images)["logits"], answer(model, images), valid_pixels=config == PIXELS)


def test_whole_models_can_be_pickled(pixel_values, tmp_path):
    """huggingface/accelerate#2613: functions and classes that are made at run time cannot."""
    for architecture, config in [("Dinov2Model", {}), ("BeitForImageClassification", {"prompt_depth": "all"})]:
        model = move_adapter(get_peft_model(tiny_vit(architecture), tiny_config(id2label=NAMES, **config))).eval()
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
        assert_nearly_equal(answer(copied, pixel_values), answer(model, pixel_values))
        with copied.disable_adapter():  # by its own switch
            assert answer(model, pixel_values).shape == (4, 2)


def test_synchronised_batch_norms_do_the_same(pixel_values):
    """pytorch/pytorch#187298, huggingface/pytorch-image-models#1254: what a subclass of BatchNorm does was lost."""
    model = adapted()
    expected = answer(model, pixel_values)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert_nearly_equal(answer(converted, pixel_values), expected)


def test_scores_are_what_the_kind_of_labels_asks_for():
    """huggingface/transformers#21303, #35848: every regression gave 1, sigmoid and softmax were swapped."""
    image = Image.new("RGB", (32, 32), (200, 30, 20))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    functions = {
        "multi_label_classification": torch.sigmoid,
        "single_label_classification": lambda logits: logits.softmax(dim=-1),
    }
    if Version(transformers.__version__) >= Version("5.24"):  # the pipeline of 5.10 applies a sigmoid
        functions["regression"] = lambda logits: logits
    for problem_type, function in functions.items():
        model = adapted(id2label=NAMES | {2: "owl"}, problem_type=problem_type)
        expected = function(answer(model, pixel_values))[0]
        scores = {score["label"]: score["score"] for score in Classifier(model, processor).pipeline()(image)}
        assert [scores[name] for name in ("cat", "dog", "owl")] == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_numpy_and_sets_put_into_a_configuration_is_saved(pixel_values, tmp_path):
    """huggingface/transformers#24340, huggingface/peft#567: it could not be written as JSON, after the training."""
    names = {np.int64(number): np.str_(name) for number, name in NAMES.items()}
    half = (np.float32(0.5),) * 3
    fields = {"id2label": names, "image_mean": half, "image_std": half, "modules_to_save": {"vit.layernorm"}}
    model = adapted(**(PIXELS | fields | {"library_size": np.int64(6)}))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert loaded.config.id2label == NAMES
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values), valid_pixels=True)


def run_second_adapter(folder, trainer_class, **arguments):
    """Train the second one of two adapters for a step at a time."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_vit(num_hidden_layers=1), tiny_config(id2label=NAMES))
    model.add_adapter("second", tiny_config(id2label=NAMES))
    model.set_adapter("second")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(images)]
    resumed = arguments.pop("resume_from_checkpoint", None)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=0.01, lr_scheduler_type="constant", save_steps=1,
        save_strategy="steps", report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        **arguments,
    )  # fmt: skip
    collator = ImageCollator(num_labels=2)
    trainer = trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def test_a_run_of_a_second_adapter_is_resumed(tmp_path):
    """huggingface/transformers#28531, #30478: adapters with a name were not found in the checkpoint."""
    whole = run_second_adapter(tmp_path / "whole", Trainer, max_steps=2).model
    resume = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-1")}
    resumed = run_second_adapter(tmp_path / "resumed", Trainer, max_steps=2, **resume).model
    assert resumed.active_adapters == ["second"]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())


def test_the_best_weights_of_a_second_adapter_come_back(tmp_path):
    """huggingface/transformers#36201: it got those of the first one, which lie where `Trainer` looks."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run_second_adapter(tmp_path, AdapterTrainer, max_steps=2, **best)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_a_model_of_the_same_configuration_keeps_its_labels():
    """eth-easl/modyn#572: models that are made of one configuration object share it."""
    base = tiny_vit()
    teacher = ViTForImageClassification(base.config)
    get_peft_model(base, tiny_config(id2label=NAMES))
    assert teacher.config.num_labels == 5


def test_every_adapter_of_a_half_precision_model_is_in_float32(tmp_path):
    """huggingface/peft#1090, #2421: the second one that was loaded was rounded."""
    model, adapter = saved_classifier(tmp_path)
    expected = {name.partition("model.model.")[2]: tensor for name, tensor in model.state_dict().items()}
    loaded = PeftModel.from_pretrained(tiny_vit().to(torch.bfloat16), adapter)
    loaded.load_adapter(adapter, "second")
    by_transformers = AutoModelForImageClassification.from_pretrained(adapter, dtype=torch.bfloat16)
    for found in (loaded.get_base_model(), by_transformers):
        for name, tensor in found.state_dict().items():
            if ".pgn_" in name:
                assert torch.equal(tensor, expected[name.replace(".second.", ".default.")]), name


def test_a_model_that_is_unloaded_is_the_base_again(pixel_values):
    """huggingface/peft#3455, #3025: it failed if the active adapter saves no module, and left a `peft_config`."""
    base = tiny_vit()
    before, classes = base.config.to_dict(), [type(module) for module in base.modules()]
    model = move_adapter(get_peft_model(base, tiny_config(id2label=NAMES, modules_to_save=["vit.layernorm"])))
    model.add_adapter("second", tiny_config(id2label={0: "rose"}, prompt_depth="all"))
    model.set_adapter("second")
    model(pixel_values, labels=torch.zeros(4)).loss.backward()
    unloaded = model.unload().eval()
    assert_nearly_equal(answer(unloaded, pixel_values), answer(tiny_vit(), pixel_values))
    assert unloaded.config.to_dict() == before
    assert [type(module) for module in unloaded.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")


def test_tensors_that_were_read_once_go_into_several_models(pixel_values):
    """huggingface/peft#3592: the dictionary was changed when it was loaded, and the next model missed tensors."""
    model = adapted(modules_to_save=["vit.layernorm"])
    tensors = get_peft_model_state_dict(model)
    for _ in range(2):
        other = get_peft_model(tiny_vit(), tiny_config(id2label=NAMES, modules_to_save=["vit.layernorm"])).eval()
        set_peft_model_state_dict(other, tensors)
        assert_nearly_equal(answer(other, pixel_values), answer(model, pixel_values))


def test_all_tensors_move_with_the_model(pixel_values):
    """adapter-hub/adapters#456: some stayed on the CPU."""
    for config in ({"prompt_depth": "all"}, {"head": "frozen", "id2label": None, **PIXELS}):
        model = adapted(**config).to("meta")
        assert model(pixel_values.to("meta")).logits.is_meta


def test_the_chosen_adapter_is_saved_while_all_are_off(pixel_values, tmp_path):
    """huggingface/peft#969: another one's weights were saved or loaded in its place."""
    model = adapted()
    model.add_adapter("second", tiny_config(id2label={0: "rose", 1: "tulip"}))
    move_adapter(model, seed=3)
    with model.disable_adapter():
        model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"second"}
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "second")
    model.set_adapter("second")
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
    assert loaded.config.id2label == {0: "rose", 1: "tulip"}
