"""The ladder: its order, what each rung starts from, what is chosen, and that an interrupted one goes on."""

import dataclasses
import math

import pytest
import torch
from conftest import assert_same, tiny_config, tiny_vit
from peft import LoraModel, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

from pgn_peft import PGNConfig
from pgn_peft.nn.heads import deal_folds, fit_ridge
from pgn_peft.training import Ladder, RungResult
from pgn_peft.training import ladder as module
from pgn_peft.training.rungs import RUNGS, UNTRAINED, Start, Trained, find_heads
from pgn_peft.tuner.adapters import prompt_layer

LABELS = {0: "dark", 1: "bright", 2: "striped"}
RUNG = {rung.name: rung for rung in RUNGS}


class Images(Dataset):
    """Noise, of which some is brighter and some has stripes; hard enough for mistakes."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.pixels += 0.05 * (self.labels == 1)[:, None, None, None]
        self.pixels[self.labels == 2, :, ::2] += 0.1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}


def make_ladder(folder, **options):
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=10, use_cpu=True)
    arguments.num_train_epochs = None  # as the script leaves it open
    options = {"validation": Images(30, seed=1), "arguments": arguments, "budget_minutes": 60} | options
    return Ladder(options.pop("make_model", tiny_vit), Images(60), LABELS, folder, **options)


@pytest.fixture
def short(monkeypatch):
    """One training of four steps on each rung: there is no time for a search."""
    monkeypatch.setattr(module, "SHORTEST", 4)
    monkeypatch.setattr(Ladder, "_affordable_steps", lambda self, seconds, candidates, *_: 4 if candidates == 1 else 0)


def fake_training(ladder, calls):
    """Train nothing: accuracy is best at the second rate, and grows with the steps."""

    def train(rung, start, rate, rows, held_out, steps, refit, callbacks):
        calls.append((rate, steps, len(rows)))
        count = 0 if held_out is None else len(held_out)
        number = round(count * (0.3 + 0.4 * (rate == rung.rates[1]) + 0.001 * steps))
        labels = torch.zeros(count, dtype=torch.long)
        logits = torch.zeros(count, 3)
        logits[:number, 0] = 1
        logits[number:, 1] = 1
        model = ladder.task.build(rung, start)
        head = tuple(part.detach() for part in find_heads(model)[1].parameters())
        return Trained(model, logits, logits, head, labels, 1e-9)

    object.__setattr__(ladder.task, "train_candidate", train)


def result(name, accuracy, standard_error=0.02):
    return RungResult(name, accuracy, standard_error)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [((0.80, 0.79, 0.81), 0), ((0.70, 0.79, 0.80), 1), ((0.70, None, 0.80), 2), ((0.9, 0.95, 0.8), 1)],
)
def test_the_cheapest_within_one_standard_error_is_chosen(tmp_path, accuracies, expected):
    ladder = make_ladder(tmp_path)
    ladder.results = [result(rung.name, accuracy) for rung, accuracy in zip(RUNGS, accuracies, strict=False)]
    assert ladder.chosen.name == RUNGS[expected].name


def test_all_rungs_in_their_order_and_their_saved_models(tmp_path, short):
    ladder = make_ladder(tmp_path, allow_weights=True)
    base = tiny_vit().state_dict()
    for found, rung in zip(ladder.climb(), RUNGS, strict=True):
        assert found.name == rung.name
        assert found.base_untouched is not rung.changes_weights
        likely = (30 * found.accuracy + 1) / 32
        assert found.standard_error == pytest.approx(math.sqrt(likely * (1 - likely) / 30))
        model = ladder.load(found)
        assert_same(ladder.accuracy(model, ladder.task.validation), found.accuracy)
        assert not model.training
        if isinstance(model, PeftModel) and not isinstance(model.base_model, LoraModel):
            weights = model.unload().state_dict()
            assert all(torch.equal(weights[name], tensor) for name, tensor in base.items())
    counts = {found.name: found.parameters for found in ladder.results}
    head = 3 * 32 + 3
    assert counts["linear head"] == counts["untrained prompts"] == head
    assert counts["static prompts, first layer"] == head + 16 * 32
    assert counts["static prompts, every layer"] == head + 2 * 16 * 32
    assert counts["full fine-tuning"] == sum(tensor.numel() for tensor in base.values()) - 5 * 33 + head
    assert len(ladder.rows()) == len(RUNGS)
    assert sum(row["method"].startswith("**") for row in ladder.rows()) == 1


def test_a_head_alone_is_ridge_regression_on_the_frozen_features(tmp_path):
    ladder = make_ladder(tmp_path)
    found = next(ladder.climb())
    frozen = tiny_vit()
    with torch.no_grad():
        features, others = (
            frozen.vit(pixel_values=rows.pixels).last_hidden_state[:, 0] for rows in (Images(60), Images(30, 1))
        )
    weight, bias, _ = fit_ridge(features, Images(60).labels, 3)
    expected = others.double() @ weight.mT + bias
    with torch.no_grad():
        logits = ladder.load(found)(pixel_values=Images(30, 1).pixels).logits
    assert_same(logits.double(), expected)
    assert found.accuracy == pytest.approx(float((expected.argmax(1) == Images(30, 1).labels).double().mean()))


def test_an_adapter_without_prompts_leaves_the_features_alone(pixel_values):
    model = get_peft_model(tiny_vit(), PGNConfig(generator="static", num_virtual_tokens=0, head="frozen"))
    assert_same(model(pixel_values=pixel_values).logits, tiny_vit()(pixel_values=pixel_values).logits)
    with pytest.raises(ValueError, match="num_virtual_tokens=0"):
        get_peft_model(tiny_vit(), tiny_config(num_virtual_tokens=0))


def test_trained_prompts_start_from_the_chosen_draw(tmp_path):
    ladder = make_ladder(tmp_path)
    start = Start("all", seed=3)
    expected = 0.02 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    static = ladder.task.build(RUNG["static prompts, every layer"], start)
    assert_same(prompt_layer(static).library("default").tokens.detach(), expected)
    generated = ladder.task.build(RUNG["generated prompts, every layer"], start)
    assert_same(prompt_layer(generated).library("default").slot_prompts.detach(), expected)
    accumulated = ladder.task.build(RUNG["static prompts, every layer"], Start(1, seed=4))
    drawn = 0.02 * torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    expected = torch.stack([drawn, torch.zeros(16, 32)])
    assert_same(prompt_layer(accumulated).library("default").tokens.detach(), expected)
    assert ladder.task.build(UNTRAINED, Start(1, 0)).peft_config["default"].prompt_depth == 1


def test_an_interrupted_ladder_goes_on(tmp_path):
    before, again = make_ladder(tmp_path), make_ladder(tmp_path)
    fake_training(before, [])
    fake_training(again, [])
    begun = before.climb()
    first = [next(begun) for _ in range(3)]
    begun.close()
    again.results = make_ladder(tmp_path).results
    assert again.results == first
    everything = list(again.climb())
    assert everything[:3] == first
    assert [found.name for found in everything] == [rung.name for rung in RUNGS[:6]]
    assert make_ladder(tmp_path).results == everything
    assert make_ladder(tmp_path, budget_minutes=90).results == first[:2]
    with pytest.raises(ValueError, match="results of a ladder with other seed"):
        make_ladder(tmp_path, seed=1)
    with pytest.raises(ValueError, match="results of a ladder with other model"):
        make_ladder(tmp_path, make_model=lambda: tiny_vit(seed=1))


def test_what_the_budget_does_not_reach_is_skipped(tmp_path):
    results = list(make_ladder(tmp_path, budget_minutes=0).climb())
    assert [found.accuracy is None for found in results] == [False, False, True, True, True, True]
    assert results[2].choice == "skipped: 0 steps fit into the budget"


def test_nothing_is_trained_after_a_perfect_rung(tmp_path):
    ladder = make_ladder(tmp_path, allow_weights=True)
    ladder.results = [result("linear head", 1.0), result("untrained prompts", 0.9)]
    assert {found.choice for found in list(ladder.climb())[2:]} == {
        "skipped: nothing can be clearly better than the linear head"
    }


def test_the_rate_is_chosen_by_successive_halving(tmp_path):
    ladder, calls = make_ladder(tmp_path), []
    climb = ladder.climb()
    next(climb), next(climb)
    fake_training(ladder, calls)
    found = next(climb)
    rates = RUNG["static prompts, first layer"].rates
    assert calls == [
        *((rate, 25, 60) for rate in rates),
        *((rate, 50, 60) for rate in (rates[1], rates[0])),
        (rates[1], 100, 60),
    ]
    assert found.accuracy == pytest.approx(0.8)
    assert found.choice.startswith("100 of 100 steps, rate 0.001, best of 3")


def test_without_validation_images_every_image_is_predicted_once(tmp_path):
    ladder, calls = make_ladder(tmp_path, validation=None), []
    climb = ladder.climb()
    assert round(60 * next(climb).accuracy, 6) == round(60 * ladder.results[0].accuracy)
    next(climb)
    fake_training(ladder, calls)
    next(climb)
    folds = deal_folds(Images(60).labels, 3)
    assert sorted(torch.cat([rest for _, rest in folds]).tolist()) == list(range(60))
    assert all(set(rows.tolist()).isdisjoint(rest.tolist()) for rows, rest in folds)
    assert [number for _, steps, number in calls if steps == 100] == [40, 40, 40, 60]


def test_a_training_is_as_long_as_the_budget_allows(tmp_path):
    ladder = make_ladder(tmp_path)
    ladder._prediction_seconds, ladder._step_seconds = 0.01, 0.1
    parts = [(torch.arange(60), ladder.task.validation)]
    # Three candidates for a quarter, two for half, one for the whole: 2.75 trainings. Each ends with 30 predictions,
    # the last one with 60 more.
    assert ladder._affordable_steps(60, 3, parts, 10) == int((60 - (6 * 30 + 60) * 0.01) / (2.75 * 10 * 0.1))
    assert ladder._affordable_steps(60, 1, parts, 10) == int((60 - (30 + 60) * 0.01) / (10 * 0.1))
    assert ladder._affordable_steps(1, 3, parts, 10) == 0


def test_cheaper_rungs_go_first_where_time_is_short(tmp_path):
    """A share of the budget is not enough for any rung, but the budget is for one."""
    ladder, calls = make_ladder(tmp_path, budget_minutes=1), []
    climb = ladder.climb()
    next(climb), next(climb)
    fake_training(ladder, calls)
    ladder.budget, ladder._prediction_seconds, ladder._step_seconds = 30.0, 0.0, 0.1
    ladder.results = [dataclasses.replace(found, seconds=0.0, accuracy=0.5) for found in ladder.results]
    assert next(climb).choice.startswith("20 of 100 steps, rate 0.001, best of 1")
    assert calls == [(1e-3, 20, 60)]


def test_candidates_are_compared_on_images_of_all_classes():
    assert module._spread(4, 10) == [0, 1, 2, 3]
    assert module._spread(1000, 4) == [0, 250, 500, 750]


def test_results_are_of_the_same_images(tmp_path):
    next(make_ladder(tmp_path).climb())
    plain = Images(60)
    with pytest.raises(ValueError, match="other training images and validation images"):
        make_ladder(tmp_path, validation=Images(30, seed=2), plain=plain)
    plain.labels = plain.labels.flip(0)
    with pytest.raises(ValueError, match="other training images"):
        Ladder(tiny_vit, plain, LABELS, tmp_path, validation=Images(30, seed=1), budget_minutes=60)


def test_a_model_without_a_head_gets_one(tmp_path):
    found = next(make_ladder(tmp_path, make_model=lambda: tiny_vit("ViTModel")).climb())
    assert found.accuracy > 0
    assert found.inference > 0


def test_results_are_plain_numbers(tmp_path):
    found = next(make_ladder(tmp_path).climb())
    assert {type(value) for value in dataclasses.asdict(found).values()} <= {str, float, int, bool, dict}
