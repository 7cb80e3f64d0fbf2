"""The measuring tools of the benchmarks: saved activations, turns, ratios, and paired differences of accuracy."""

import report
import timing
import torch
from torch import nn


def test_kept_bytes_are_activations_without_weights_and_are_let_go():
    layer, inputs = nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    outputs = []
    kept = timing.count_saved_bytes(lambda: outputs.append(layer(inputs).exp()), list(layer.parameters()))
    assert kept == inputs.nbytes + 4 * 16 * 4  # of the exponential, its result
    assert timing.count_saved_bytes(lambda: layer.requires_grad_(False)(inputs).exp(), list(layer.parameters())) == 0


def test_a_ratio_is_taken_round_by_round():
    # The machine was four times as slow in the second round: medians alone would compare 2 with 3.
    seconds = {"ours": [2.0, 8.0, 2.0], "theirs": [1.0, 4.0, 3.0]}
    assert timing.ratio(seconds, "ours", "theirs") == 2.0


def test_turns_are_counted_after_the_warm_up():
    calls = []
    seconds = timing.take_turns({"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, rounds=3, warm_up=2)
    assert len(calls) == 2 * (3 + 2)
    assert calls[:4] == [2, 1, 1, 2]  # every other round in reverse
    assert [len(each) for each in seconds.values()] == [3, 3]


def runs(tests, rate=0.1):
    return report.Cell([report.Run("", "data", "", rate, seed, test=test) for seed, test in tests.items()], trials=1)


def test_differences_are_paired_by_seed_and_called_ahead_only_with_t_above_two():
    one, other = runs({0: 0.90, 1: 0.80, 2: 0.73}), runs({1: 0.78, 2: 0.70, 0: 0.86})
    found = report.difference(one, other)  # 4, 2 and 3 points, of standard error 1 / sqrt(3)
    assert abs(found.mean - 0.03) < 1e-9
    assert abs(found.t - 3 * 3**0.5) < 1e-6
    assert found.verdict == "ahead"
    assert report.difference(other, one).verdict == "behind"
    assert report.difference(one, runs({0: 0.80, 1: 0.90, 2: 0.72})).verdict == "level"
    assert report.difference(one, runs({0: 0.5})).verdict == "one seed"
    assert report.difference(one, runs({7: 0.5})) is None
    assert report.difference(one, runs({0: 0.5}, rate=None)).seeds == 3  # without anything random


def test_a_cell_is_the_rate_that_was_best_on_validation_with_the_number_of_trials():
    common = {"protocol": "small", "model": "vit", "data": "digits", "method": "pgn"}
    rows = []
    for rate, validation in ((0.1, 0.6), (0.3, 0.7), (0.5, 0.5)):
        settings = common | {"rate": rate, "seed": 0, "overrides": {}}
        rows.append({"settings": settings, "validation_accuracy": validation, "trainable_parameters": 7})
    rows.append({"settings": settings | {"overrides": {"mixing": "linear"}}, "validation_accuracy": 0.9})
    for seed, test in ((0, 0.61), (1, 0.63)):
        rows.append({"settings": common | {"rate": 0.3, "seed": seed, "overrides": {}, "split": "test"}})
        rows[-1]["test_accuracy"] = test
    cells = report.chosen(report.read(rows))
    assert str(cells["digits", "pgn"]) == "0.620 ± 0.014 (2; 4)"
    assert "| **PGN** | mixing linear | 0.900 at 0.5 |" in report.report(rows)
