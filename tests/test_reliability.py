"""Damage is found, nothing saved is lost: a part of benchmarks/faults.py, and what it found."""

import os
import shutil
from pathlib import Path

import fault_files
import fault_images
import pytest
import torch
from conftest import edit_json, move_adapter, tiny_config, tiny_vit
from fault_outcomes import Tally
from fault_processes import Pair, classify, kill_at_operation, one_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_trainer import make_trainer

from pgn_peft import ImagePrompter, PGNConfig, load_classifier
from pgn_peft.hub import classifier as classifier_module
from pgn_peft.training import last_complete_checkpoint
from pgn_peft.utils.files import COMPLETE, replacing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny base model with adapters and a prompter."""
    return fault_files.Material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def saved(material, tmp_path):
    """A folder with an adapter, its processor and its card."""
    return Path(shutil.copytree(material.root / "generated", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("campaign", "cases"),
    [
        (fault_files.damaged_files, 32),
        (fault_files.other_types, 40),
        (fault_files.path_tricks, 40),
        (fault_images.all_images, 6),
    ],
)
def test_no_damage_is_accepted_in_silence(campaign, cases, material):
    tally = Tally()
    campaign(tally, material, cases, seed=1)
    assert not tally.wrong
    assert sum(counts.total() for counts in tally.counts.values()) >= cases


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


LOADERS = {
    "load_classifier": lambda folder, base: load_classifier(folder),
    "PeftModel": lambda folder, base: PeftModel.from_pretrained(base, folder),
    "PGNConfig": lambda folder, base: PGNConfig.from_pretrained(folder),
    "Transformers": lambda folder, base: base.load_adapter(str(folder)),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_flipped_bit_in_a_weight_is_refused(load, saved, material):
    flip(saved / WEIGHTS, -5)  # in the last number's mantissa: a valid file, with another weight
    with pytest.raises(ValueError, match=rf"({WEIGHTS}|`pgn_\w+)` must h\w+ .*remove `checksums` from {CONFIG}"):
        load(saved, material.base())


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(("old", "new"), [('"cat"', '"bat"'), ('"mixing"', '"mixinf"'), (": 16", ": 17")])
def test_a_changed_letter_in_the_configuration_is_refused(old, new, load, saved, material):
    text = (saved / CONFIG).read_text(encoding="utf-8")
    assert old in text
    (saved / CONFIG).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=f"`{CONFIG}` must hold the fields that were saved"):
        load(saved, material.base())


def test_a_changed_processor_is_refused_by_the_loader_that_reads_it(saved, material):
    edit_json(saved / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.2])
    with pytest.raises(ValueError, match="preprocessor_config.json` must have the SHA-256 checksum"):
        load_classifier(saved)
    PeftModel.from_pretrained(material.base(), saved)  # which does not read it


def test_what_is_changed_on_purpose_is_taken_without_checksums_and_gets_new_ones(saved, material):
    tensors = load_file(saved / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, saved / WEIGHTS, metadata={"format": "pt"})
    edit_json(saved / CONFIG, base_model_name_or_path=str(material.root / "base"), checksums=None)
    model = PeftModel.from_pretrained(material.base(), saved)
    model.save_pretrained(saved)
    flip(saved / WEIGHTS, -5)
    with pytest.raises(ValueError, match=f"{WEIGHTS}` must have the SHA-256 checksum"):
        PeftModel.from_pretrained(material.base(), saved)


def test_transformers_own_save_over_an_earlier_one_leaves_no_wrong_checksums(saved, material, tmp_path):
    """It writes the configuration first, so that the weights that lie beside it are the earlier ones."""
    model = material.base()
    model.load_adapter(str(saved))
    for _ in range(2):
        move_adapter(model, seed=5)
        expected = fault_files.logits(model)
        tensors = {f"base_model.model.{n}": t for n, t in model.state_dict().items() if "pgn_" in n}
        tensors = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
        model.peft_config["default"].save_pretrained(str(saved))
        save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
        assert torch.allclose(fault_files.logits(PeftModel.from_pretrained(material.base(), saved)), expected)


def test_prompters_files_are_compared_too(material, tmp_path):
    folder = Path(shutil.copytree(material.root / "prompter", tmp_path / "prompter"))
    flip(folder / "prompter.safetensors", -5)
    with pytest.raises(ValueError, match="prompter.safetensors` must have the SHA-256 checksum"):
        ImagePrompter.from_pretrained(folder)
    shutil.copy(material.root / "prompter/prompter.safetensors", folder)
    ImagePrompter.from_pretrained(folder)
    text = (folder / "prompter_config.json").read_text(encoding="utf-8")
    (folder / "prompter_config.json").write_text(text.replace("LABEL_0", "LABEL_9", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="`prompter_config.json` must hold the fields that were saved"):
        ImagePrompter.from_pretrained(folder)


# Saving that is interrupted.


@pytest.fixture(scope="module")
def pair(material):
    """Two adapters and two prompters that take each other's place."""
    return Pair(material)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", ["adapter", "prompter"])
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new(what, pair, tmp_path):
    save, load = (pair.save, pair.load_with_peft) if what == "adapter" else (pair.save_prompter, pair.load_prompter)
    for place in range(200):
        finished, outcome = kill_at_operation(save, load, tmp_path / "saved", place)
        assert outcome == ("accepted and right", ""), f"killed before file operation {place}"
        if finished:
            break
    assert 5 < place < 199


def test_a_save_that_fails_leaves_the_old_and_names_the_folder(pair, tmp_path, monkeypatch):
    pair.save(0, tmp_path)
    before = fault_files.listing(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for function in ("pgn_peft.hub.publishing.save_file", "pgn_peft.utils.files.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(function, full)
            with pytest.raises(OSError, match=rf"`save_directory` must .*{tmp_path}.*No space left on device"):
                pair.save(1, tmp_path)
        assert fault_files.listing(tmp_path) == before


def test_an_interrupted_save_is_not_completed_over_later_weights(pair, material, tmp_path):
    pair.save(0, tmp_path / "adapter")
    pair.save(1, tmp_path / "other")
    (tmp_path / "adapter" / COMPLETE).mkdir()
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "adapter" / COMPLETE)
    pair.save_as_peft_does(0, tmp_path / "adapter")
    assert pair.load_with_peft(tmp_path / "adapter")[0] == "accepted and right"
    assert not (tmp_path / "adapter" / COMPLETE).exists()


def test_two_processes_that_complete_a_save_at_the_same_time(tmp_path):
    """One finds the other's files on their way, and moves them first."""
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "a.txt").write_text("theirs")
    with replacing(tmp_path) as staged:
        (staged / "b.txt").write_text("ours")
    assert (tmp_path / "a.txt").read_text() == "theirs"
    assert (tmp_path / "b.txt").read_text() == "ours"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_the_first_one(pair, tmp_path, monkeypatch):
    """The model was that of one adapter, and the image processor that of another one."""
    pair.save(0, tmp_path)
    load = classifier_module.AutoImageProcessor.from_pretrained

    def save_and_load(*arguments, **options):
        pair.save(1, tmp_path)
        return load(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(classifier_module.AutoImageProcessor, "from_pretrained", save_and_load)
        found = classify(tmp_path)
    assert one_of(found, pair.answers[:1])
    assert not one_of(found, pair.answers[1:])


@pytest.mark.parametrize("load", [load_classifier, PeftModel.from_pretrained], ids=["load_classifier", "PeftModel"])
def test_weights_that_are_replaced_after_they_were_checked_are_refused(load, saved, material, monkeypatch):
    read = PGNConfig.from_pretrained.__func__

    def read_and_replace(cls, *arguments, **options):
        config = read(cls, *arguments, **options)
        flip(saved / WEIGHTS, -5)
        return config

    monkeypatch.setattr(PGNConfig, "from_pretrained", classmethod(read_and_replace))
    arguments = (material.base(), saved) if load is not load_classifier else (saved,)
    with pytest.raises(OSError, match=rf"`{saved}.*` must not be written to while it is loaded"):
        load(*arguments)


def test_weights_that_were_saved_over_since_training_began_do_not_hinder_loading_others(saved, material):
    """A configuration can be the recipe of a new adapter, which is saved in its place and goes back to its best."""
    model = get_peft_model(material.base(), PGNConfig.from_pretrained(saved)).train()
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flip(saved / WEIGHTS, -5)
    model.load_state_dict(best)


# Training.


def test_a_checkpoint_on_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run")

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch's words

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"`output_dir` must take the checkpoint of step 2, but got .*run.*unexpected pos"
    ):
        trainer.train()


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(tmp_path):
    make_trainer(tmp_path).train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    flip(tmp_path / "checkpoint-4" / WEIGHTS, -5)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


# Names.


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "a\\b", "C:", "a\nb", "a\0b", "\udc80", "a" * 101])
def test_names_of_adapters_are_names_of_folders(name, tmp_path):
    with pytest.raises(ValueError, match=r"`adapter_name` must be a (name for a folder|word)"):
        get_peft_model(tiny_vit(), tiny_config(num_labels=2), adapter_name=name)


@pytest.mark.parametrize("subfolder", ["../other", "a/../../other", "/other"])
def test_a_subfolder_lies_inside(subfolder, saved):
    shutil.copytree(saved, saved.parent / "other")
    with pytest.raises(ValueError, match="`subfolder` must lie in the adapter's repository or folder, but got"):
        load_classifier(saved, subfolder=subfolder)


def test_a_class_name_that_no_file_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"`id2label` must hold text that can be written .*udc80"):
        PGNConfig(id2label={0: "cat", 1: "d\udc80g"})
    assert PGNConfig(id2label={0: "Katze", 1: "\N{SNOWMAN}"}).num_labels is None
