"""A few cases of each campaign of benchmarks/faults.py."""

import faults
import pytest


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return faults.Material(tmp_path_factory.mktemp("material"))


not_yet = pytest.mark.xfail(strict=True, reason="the files have checksums")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[not_yet] if name in ("edits", "weights") else []) for name in faults.CAMPAIGNS],
)
def test_every_promise_is_kept(name, material):
    tally = faults.Tally()
    faults.CAMPAIGNS[name](tally, material, few=True)
    assert tally.counts
    assert not tally.broken
