"""Parameter groups, complete checkpoints, and `Trainer` itself."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import answer, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from pgn_peft import ImageCollator
from pgn_peft.training import last_complete_checkpoint, parameter_groups

NAMES = {0: "dark", 1: "bright"}


def adapted(**overrides):
    return get_peft_model(tiny_vit(), tiny_config(**({"id2label": NAMES} | overrides)))


def test_each_trainable_parameter_is_in_one_group_with_its_rate():
    model = adapted(modules_to_save=["vit.layernorm"])
    groups = parameter_groups(model, 1e-3, library_learning_rate=1e-2, head_learning_rate=1e-4, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for name, group in grouped:
        part = next((part for part in ("pgn_generator", "pgn_library", "pgn_head") if part in name), "other")
        assert group["name"] == part
        assert group["lr"] == {"pgn_generator": 1e-3, "pgn_library": 1e-2, "pgn_head": 1e-4, "other": 1e-3}[part]
        assert group["weight_decay"] == (0.1 if dict(model.named_parameters())[name].ndim > 1 else 0)


PIXELS = {"prompt_space": "pixel", "image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("fields", "library"),
    [
        ({}, 1e-2),
        ({"prompt_depth": 2}, 1e-3),
        ({"generator": "static"}, 1e-2),
        ({"generator": "static", "prompt_depth": 2}, 1e-3),
        (PIXELS | {"prompt_layout": "dense", "num_virtual_tokens": None}, 3e-2),
    ],
)
def test_each_form_has_rates_that_suit_it(fields, library):
    model = adapted(**fields)
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, 1e-3)}
    expected = {"pgn_generator": 1e-3, "pgn_library": library, "pgn_head": 3e-3}
    assert rates == pytest.approx({part: rate for part, rate in expected.items() if part in rates})
    assert {"pgn_library", "pgn_head"} <= rates.keys()


def test_each_adapter_has_the_rates_of_its_form():
    model = adapted()
    model.add_adapter("deep", tiny_config(id2label=NAMES, prompt_depth=2))
    model.add_adapter("other", tiny_config(id2label=NAMES))  # which is also how the last group is called
    for name, expected in {"default": 1e-2, "deep": 1e-3, "other": 1e-2}.items():
        model.set_adapter(name)
        (rate,) = {group["lr"] for group in parameter_groups(model, 1e-3) if group["name"] == "pgn_library"}
        assert rate == pytest.approx(expected)


def test_a_frozen_model_has_no_groups():
    with pytest.raises(ValueError, match="`model` must have trainable parameters, but got a frozen one"):
        parameter_groups(tiny_vit().requires_grad_(False), 1e-3)


def rows(count=24):
    generator = torch.Generator().manual_seed(0)
    labels = [index % 2 for index in range(count)]
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator) * 0.3 + label, "labels": label}
        for label in labels
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has run for ten epochs, each with a last batch of one image."""
    torch.manual_seed(0)
    model = adapted()
    arguments = TrainingArguments(
        output_dir=tmp_path_factory.mktemp("run"),
        num_train_epochs=10,
        per_device_train_batch_size=23,
        learning_rate=2e-2,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        gradient_checkpointing=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(8), data_collator=ImageCollator(num_labels=2)
    )
    trainer.train()
    return trainer


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder, to be damaged."""
    return shutil.copytree(trained.args.output_dir, tmp_path / "run")


def test_trainer_trains_evaluates_checkpoints_and_reloads_the_best(trained):
    assert trained.label_names == ["labels"]
    losses = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
    assert min(losses) < 0.5  # 0.69 is what guessing between two classes costs
    assert trained.evaluate()["eval_loss"] == pytest.approx(min(losses))
    checkpoint = Path(trained.args.output_dir, "checkpoint-2")
    assert {file.name for file in checkpoint.glob("*model*")} == {"adapter_model.safetensors"}
    best = PeftModel.from_pretrained(tiny_vit(), trained.state.best_model_checkpoint)
    images = torch.stack([row["pixel_values"] for row in rows(8)])
    torch.testing.assert_close(answer(best, images), answer(trained.model.eval(), images))
    frozen = tiny_vit().state_dict()
    for name, tensor in trained.model.unload().state_dict().items():
        assert torch.equal(tensor, frozen[name]), f"frozen {name} changed"


def truncate(file):
    os.truncate(file, file.stat().st_size - 10)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", truncate),
        ("adapter_model.safetensors", os.remove),
        ("optimizer.pt", truncate),
        ("optimizer.pt", flip_a_byte),
        ("scheduler.pt", os.remove),
        ("rng_state.pth", truncate),
        ("trainer_state.json", truncate),
        ("trainer_state.json", os.remove),
    ],
)
def test_a_checkpoint_left_incomplete_is_passed_over(run, caplog, name, damage):
    assert last_complete_checkpoint(run) == run / "checkpoint-20"
    damage(run / "checkpoint-20" / name)
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(run) == run / "checkpoint-18"
    assert "checkpoint-20, which a crash seems to have left incomplete" in caplog.text


def test_no_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file", encoding="utf-8")
    assert last_complete_checkpoint(tmp_path) is None


def as_if_saved_by(processes, checkpoint):
    for rank in range(processes):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()


def test_a_checkpoint_will_do_for_another_number_of_processes(run, caplog):
    for world_size in (1, 2):
        assert last_complete_checkpoint(run, world_size) == run / "checkpoint-20"
    assert "checkpoint-20 was saved by 1 process(es), not 2: random numbers start anew" in caplog.text
    as_if_saved_by(3, run / "checkpoint-20")
    for world_size in (1, 2, 3, 4):
        assert last_complete_checkpoint(run, world_size) == run / "checkpoint-20"
    assert "was saved by 3 process(es), not 1" in caplog.text
    assert "not 3" not in caplog.text


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_crash_that_lost_a_process_is_no_other_number_of_processes(run, missing, world_size):
    as_if_saved_by(2, run / "checkpoint-20")
    (run / f"checkpoint-20/rng_state_{missing}.pth").unlink()
    assert last_complete_checkpoint(run, world_size) == run / "checkpoint-18"


def test_a_damaged_random_state_of_another_number_of_processes(run):
    as_if_saved_by(2, run / "checkpoint-20")
    flip_a_byte(run / "checkpoint-20/rng_state_1.pth")
    assert last_complete_checkpoint(run) == run / "checkpoint-18"


def test_a_checkpoint_of_an_adapter_with_a_name(run):
    (run / "checkpoint-20/mine").mkdir()
    (run / "checkpoint-20/adapter_model.safetensors").rename(run / "checkpoint-20/mine/adapter_model.safetensors")
    assert last_complete_checkpoint(run) == run / "checkpoint-20"


def test_checkpoints_are_ordered_by_number(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-100")
    assert last_complete_checkpoint(run) == run / "checkpoint-100"
    assert json.loads((run / "checkpoint-100/trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 2


def test_a_checkpoint_without_the_optimizer_is_not_blamed_on_a_crash(run, caplog):
    def save_only_model(checkpoint):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (checkpoint / name).unlink()

    newest = run / "checkpoint-20"
    save_only_model(newest)
    assert last_complete_checkpoint(run) == run / "checkpoint-18"
    assert "checkpoint-20, which was saved with save_only_model=True" in caplog.text
    assert "crash" not in caplog.text
    for checkpoint in run.glob("checkpoint-*"):
        if checkpoint != newest:
            save_only_model(checkpoint)
    with pytest.raises(
        ValueError, match="must hold a checkpoint with the optimizer's state .* but got '.*checkpoint-20'"
    ):
        last_complete_checkpoint(run)
