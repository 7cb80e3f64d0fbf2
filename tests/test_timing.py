"""What the benchmarks count rather than time: operations, and bytes that are kept for the way back."""

import pytest
import timing
import torch
from torch import nn


def test_operations_of_a_linear_layer_by_hand():
    layer, inputs = nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    forward = 2 * 4 * 8 * 16
    assert timing.count_flops(lambda: layer(inputs)) == forward
    assert timing.count_flops(lambda: layer(inputs).sum().backward()) == 2 * forward  # no gradient of the inputs


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


def test_the_floor_is_whichever_takes_longer():
    machine = timing.Machine(flops=100.0, bandwidth=10.0)
    assert machine.floor(flops=200, moved=10) == pytest.approx(2)
    assert machine.floor(flops=200, moved=50) == pytest.approx(5)
