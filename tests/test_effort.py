"""Efforts: each one tries more than the one before it."""

import itertools
import math

import pytest

from jax_eplb.planner.effort import EFFORTS, effort_of


@pytest.mark.parametrize("name", EFFORTS)
def test_an_effort_is_named_and_can_be_carried_out(name):
    effort = effort_of(name)
    assert effort is EFFORTS[name]
    assert len(set(effort.ways)) == len(effort.ways) > 0
    for offset, held_back in effort.ways:
        # load / (replicas + offset) must stay positive, and slots be left to give out.
        assert -1 < offset <= 0
        assert 0 <= held_back < 1
    assert effort.swap_rounds + effort.change_rounds > 0
    assert all(power >= 1 and math.isfinite(power) for power in effort.powers)
    assert effort.balanced_rounds > 0


def test_more_effort_is_more_of_everything():
    for less, more in itertools.pairwise(EFFORTS.values()):
        assert len(less.ways) < len(more.ways)
        assert len(less.powers) < len(more.powers)
        assert less.pair_tries < more.pair_tries
        assert less.window_rounds <= more.window_rounds
        assert less.scenarios < more.scenarios
        assert less.balanced_rounds < more.balanced_rounds


def test_an_unknown_effort_is_refused_with_the_names():
    with pytest.raises(ValueError, match="effort 'much' must be one of: fast, default, best"):
        effort_of("much")
