"""`AdapterTrainer` and plain `Trainer`: losses and gradients, checkpoints, cards, what a run publishes and refuses."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import FILES, answer, assert_nearly_equal, tiny_config, tiny_vit
from huggingface_hub import ModelCard
from loopback_hub import Fault
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_trainer import NAMES, make_trainer, rows
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from pgn_peft import AdapterTrainer, ImageCollator, ModelCardInfo
from pgn_peft.training import last_complete_checkpoint

# Losses and gradients.


class Gradients(TrainerCallback):
    """Keeps the gradients that an optimizer sees."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PLAIN = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
LOSSES = {
    "classes": ({}, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), F.cross_entropy),
    "smoothed": ({}, torch.arange(8) % 3, lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.2)),
    "regression": (
        {"num_labels": 1},
        torch.linspace(-1, 1, 8),
        lambda logits, labels: F.mse_loss(logits[:, 0], labels),
    ),
    "several labels": (
        {"problem_type": "multi_label_classification"},
        (torch.arange(24).reshape(8, 3) % 2).float(),
        F.binary_cross_entropy_with_logits,
    ),
}


def adapted(**fields):
    return get_peft_model(tiny_vit(), tiny_config(**({"num_labels": 3, "generator_norm": "group"} | fields)))


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulated_batches_have_the_loss_and_the_gradients_of_one(kind, tmp_path):
    """With plain `Trainer`: `AdapterTrainer` leaves losses alone."""
    fields, labels, loss_function = LOSSES[kind]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = adapted(**fields).train()
    loss = loss_function(model(images).logits, labels)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0,
        label_smoothing_factor=0.2 * (kind == "smoothed"), logging_steps=1, save_strategy="no", **PLAIN,
    )  # fmt: skip
    gradients = Gradients()
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=ImageCollator(), callbacks=[gradients])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)  # logged with 4 digits
    assert gradients.seen.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_nearly_equal(gradients.seen[name], gradient)


def test_the_rate_for_fine_tuning_whole_models_is_pointed_out(tmp_path, caplog):
    def warnings_of(**options):
        caplog.clear()
        make_trainer(tmp_path, max_steps=1, generator="static", **options).train()
        return [record.getMessage() for record in caplog.records if "`learning_rate`" in record.getMessage()]

    (warning,) = warnings_of(learning_rate=TrainingArguments(str(tmp_path)).learning_rate)
    assert "is 5e-05, Transformers' default for whole models" in warning
    assert warnings_of(learning_rate=1e-3) == []


def test_a_frozen_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="The model is frozen. Load the adapter with is_trainable=True"):
        trainer.train()


# Checkpoints.


def test_it_trains_evaluates_checkpoints_and_reloads_the_best(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, Trainer, num_train_epochs=3, learning_rate=2e-2, **options)
    frozen = {name: tensor.clone() for name, tensor in tiny_vit(num_labels=10).state_dict().items()}
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
    checkpoint = Path(tmp_path, "checkpoint-2")
    assert {file.name for file in checkpoint.glob("*model*")} == {"adapter_model.safetensors"}
    best = PeftModel.from_pretrained(tiny_vit(num_labels=10), trainer.state.best_model_checkpoint)
    images = torch.stack([row["pixel_values"] for row in rows()])
    assert_nearly_equal(answer(best, images), answer(trainer.model.eval(), images))
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    for name, tensor in trainer.model.unload().state_dict().items():
        assert torch.equal(tensor, frozen[name]), f"frozen {name} changed"


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-best", "checkpoint-200"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-200":  # a crash left it without the file that is written last
            (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_best_checkpoints_that_trainer_would_not_find_are_refused(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    vit, config = tiny_vit(num_labels=10), tiny_config(id2label=NAMES)
    inject_adapter_in_model(config, vit)  # which is what `vit.add_adapter` does
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        AdapterTrainer(vit, TrainingArguments(str(tmp_path), **options, **PLAIN), eval_dataset=rows())


# Cards.


def test_the_card_shows_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "pets", facts=ModelCardInfo(dataset_name="Pets", license="mit"))
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "pets/README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("accuracy", "validation")
    assert result.metric_value == trainer.state.log_history[-2]["eval_accuracy"]
    assert card.data.license == "mit"
    assert "| optimizer | AdamW |" in card.text
    assert "| learning_rate | 0.001 |" in card.text
    assert "| epoch | step | training_loss | loss | accuracy |" in card.text
    assert "\n# pets\n" in card.text


def test_what_is_given_goes_before_what_the_run_shows(tmp_path):
    facts = ModelCardInfo(
        dataset_name="Pets", metrics={"f1": 0.5}, hyperparameters={"rate": 1}, training_log=[{"a": 2}]
    )
    trainer = make_trainer(tmp_path, facts=facts, generator="static")
    trainer.train()
    assert trainer.card_facts() == facts


def test_several_evaluation_sets_are_in_the_card(tmp_path):
    trainer = make_trainer(tmp_path, facts=ModelCardInfo(dataset_name="Pets"), generator="static")
    trainer.eval_dataset = {"cats": rows(2), "dogs": rows(4)}
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"cats_accuracy", "dogs_accuracy"}
    assert "| cats_loss | cats_accuracy | dogs_loss | dogs_accuracy |" in card.text
    assert len(trainer.card_facts().training_log) == 2


# Pushes.


def publisher(**options):
    """A trainer that pushes to the Hub."""
    options = {"facts": ModelCardInfo(dataset_name="Pets"), "hub_private_repo": True} | options
    return make_trainer("pets", push_to_hub=True, hub_model_id="user/pets", **options)


def test_a_run_publishes_the_adapter_and_no_pickle(hub, tmp_path):
    trainer = publisher()
    trainer.train()
    trainer.push_to_hub()
    pets = hub.repositories["user/pets"]
    assert pets.private
    assert pets.log == [
        "initial commit",
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    ]
    assert all(set(files) in (set(), FILES) for files in pets.commits.values())
    card = ModelCard(hub.content("user/pets", "README.md").decode())
    assert card.data.model_name == "pets"
    assert 'pgn_peft.load_classifier("user/pets")' in card.text
    assert set(FILES) <= {path.name for path in (tmp_path / "pets").iterdir()}


def test_a_failed_push_does_not_end_the_training(hub, caplog):
    hub.faults.append(Fault("POST", "/commit/", 500, times=2))
    trainer = publisher(generator="static")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    trainer.push_to_hub()
    assert caplog.text.count("A push while training failed.") == 2
    assert "The adapter is saved in pets" in caplog.text
    assert hub.repositories["user/pets"].log == ["initial commit", "End of training"]


def test_pushes_at_the_end_only(hub):
    trainer = publisher(generator="static", hub_strategy="end")
    trainer.train()
    assert hub.repositories["user/pets"].log == ["initial commit"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "/models/vit"}, "base model '/models/vit' is not on the Hub"),
        ({"processing_class": None}, "not an image processor"),
    ],
)
def test_what_cannot_be_published_is_refused_before_training(hub, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        publisher(**change)
