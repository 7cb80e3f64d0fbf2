"""A few cases of each campaign of benchmarks/faults.py."""

import faults
import pytest


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return faults.Material(tmp_path_factory.mktemp("material"))


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.CAMPAIGNS)
def test_every_promise_is_kept(name, material):
    tally = faults.Tally()
    faults.CAMPAIGNS[name](tally, material, few=True)
    assert tally.counts
    assert not tally.broken
