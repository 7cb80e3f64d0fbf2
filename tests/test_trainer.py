"""`AdapterTrainer`: what a run publishes, while it trains and at its end, and what it refuses before it starts."""

import logging
import re

import pytest
import torch
from conftest import FILES, assert_same, tiny_config, tiny_vit
from huggingface_hub import ModelCard
from loopback_hub import Fault
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_trainer import NAMES, make_trainer, rows
from transformers import Trainer, TrainingArguments

from pgn_peft import AdapterTrainer, CardFacts


def test_it_trains_and_saves_as_trainer_does(tmp_path):
    ours, theirs = (make_trainer(tmp_path / cls.__name__, cls) for cls in (AdapterTrainer, Trainer))
    ours.model.load_state_dict(theirs.model.state_dict())
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    assert_same(ours.model.state_dict(), theirs.model.state_dict(), tolerance=1e-3)
    names = [{path.name for path in (tmp_path / cls.__name__).rglob("*")} for cls in (AdapterTrainer, Trainer)]
    assert names[0] == names[1]


def test_the_rate_for_fine_tuning_whole_models_is_pointed_out(tmp_path, caplog):
    def warnings_of(**options):
        caplog.clear()
        make_trainer(tmp_path, max_steps=1, **options).train()
        return [record.getMessage() for record in caplog.records if "`learning_rate`" in record.getMessage()]

    (warning,) = warnings_of(learning_rate=TrainingArguments(str(tmp_path)).learning_rate)
    assert "is 5e-05, Transformers' default for whole models" in warning
    assert warnings_of(learning_rate=1e-3) == []


@pytest.mark.slow
def test_a_compiled_model_trains_and_saves_the_same(tmp_path):
    torch.compiler.reset()
    plain, compiled = (
        make_trainer(
            tmp_path / str(compile),
            generator="static",  # which compiles in a moment
            torch_compile=compile,
            torch_compile_backend="aot_eager" * compile or None,
        )
        for compile in (False, True)
    )
    compiled.model.load_state_dict(plain.model.state_dict())
    for trainer in (plain, compiled):
        torch.manual_seed(0)
        trainer.train()
    files = [
        load_file(trainer.args.output_dir + "/checkpoint-4/adapter_model.safetensors") for trainer in (plain, compiled)
    ]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, msg=name)


def test_the_card_shows_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "pets", facts=CardFacts(dataset_name="Pets", license="mit"))
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "pets/README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("accuracy", "validation")
    assert result.metric_value == trainer.state.log_history[-2]["eval_accuracy"]
    assert card.data.license == "mit"
    assert "| optimizer | AdamW |" in card.text
    assert "| learning_rate | 0.001 |" in card.text
    assert "| Training Loss | Epoch | Step | Validation Loss |" in card.text
    assert card.text.strip().startswith("# pets")


def test_what_is_given_goes_before_what_the_run_shows(tmp_path):
    facts = CardFacts(dataset_name="Pets", metrics={"f1": 0.5}, hyperparameters={"rate": 1}, training_log=[{"a": 2}])
    trainer = make_trainer(tmp_path, facts=facts)
    trainer.train()
    assert trainer.card_facts() == facts
    assert make_trainer(tmp_path / "unnamed").card_facts().metrics == {}


def publisher(**options):
    """A trainer that pushes to the Hub."""
    options = {"facts": CardFacts(dataset_name="Pets"), "hub_private_repo": True} | options
    return make_trainer("pets", push_to_hub=True, hub_model_id="user/pets", **options)


def test_a_run_publishes_the_adapter_and_no_pickle(hub, tmp_path):
    trainer = publisher(hub_always_push=True)
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
    trainer = publisher(hub_always_push=True)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.push_to_hub()
    assert caplog.text.count("A push while training failed. `repo_id` must be a repository that takes the") == 2
    assert re.search(r"hf upload user/pets pets --include adapter_config.json", caplog.text)
    assert hub.repositories["user/pets"].log == ["initial commit", "End of training"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base": "/models/vit"},
            "`base_model_name_or_path` must be the id of a model on the Hub, but got '/models",
        ),
        ({"processing_class": None}, "`processing_class` must be an image processor, but got NoneType"),
        ({"hub_strategy": "checkpoint"}, "`hub_strategy` must be one of end, every_save, but got 'checkpoint'"),
    ],
)
def test_what_cannot_be_published_is_refused_before_training(hub, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        publisher(**change)


@pytest.mark.parametrize("adapter_name", ["default", "flowers"])
def test_the_best_weights_come_back_whatever_the_adapter_is_called(adapter_name, tmp_path):
    scores = iter([1.0, 0.0])  # the first epoch is the better one
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = make_trainer(tmp_path, adapter_name=adapter_name, **options)
    trainer.compute_metrics = lambda outcome: {"accuracy": next(scores)}
    trainer.train()
    best = tmp_path / "checkpoint-2" / ("" if adapter_name == "default" else adapter_name)
    saved = load_file(best / "adapter_model.safetensors")
    kept = get_peft_model_state_dict(trainer.model, adapter_name=adapter_name)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in kept.items())
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_loading_the_best_weights_of_an_adapter_that_transformers_added_is_refused_before_training(tmp_path):
    vit = tiny_vit(num_labels=10)
    inject_adapter_in_model(tiny_config(id2label=NAMES), vit)  # which is what `vit.add_adapter` does
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    with pytest.raises(ValueError, match="`load_best_model_at_end` must be False"):
        AdapterTrainer(vit, TrainingArguments(str(tmp_path), **options), train_dataset=rows(), eval_dataset=rows())


def test_a_compiled_model_is_compiled_in_place_so_that_its_names_stay(tmp_path):
    model = make_trainer(tmp_path).model
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = AdapterTrainer(torch.compile(model, backend="eager"), arguments)
    assert trainer.model is model
    assert model._compiled_call_impl is not None
    trainer.save_model()
    assert all(name.startswith("base_model.model.vit") or "pgn_head" in name
               for name in load_file(tmp_path / "adapter_model.safetensors"))  # fmt: skip
