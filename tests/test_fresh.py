"""Fresh placements: the best of several ways, whole and without duplicates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.effort import Effort
from jax_eplb.planner.fresh import (
    Room,
    every_expert_everywhere,
    fresh_even,
    fresh_windows,
)
from jax_eplb.planner.score import score_even
from tests.greedy_reference import duplicates, greedy_plan, imbalance_of

pytestmark = pytest.mark.light_compile

W, L, E, S, P = 5, 12, 8, 12, 4
ROOM = Room(S, P, None, 1)
# Few rounds: what is tested is the choice between candidates.
FEW = Effort(
    ways=((0.0, 0.0), (-0.5, 0.25)),
    swap_rounds=2,
    finalists=1,
    change_rounds=8,
    pair_tries=0,
    scenarios=16,
    powers=(1.0, 3.0),
    window_rounds=20,
    balanced_rounds=2,
)


def windows_of(seed=0):
    generator = np.random.default_rng(seed)
    load = generator.lognormal(0, 1, (L, E)) * generator.lognormal(0, 0.5, (W, L, E))
    return load.astype(np.float32)


def assert_whole(slots):
    for row in np.asarray(slots).reshape(len(slots), P, -1):
        assert set(row.ravel().tolist()) == set(range(E))
        assert all(len(set(held.tolist())) == len(held) for held in row)


@pytest.mark.slow
def test_even_plans_are_no_worse_than_greedys():
    load = windows_of()[0]
    slots = np.asarray(jax.jit(lambda load: fresh_even(load, ROOM, FEW))(load), np.int64)
    assert_whole(slots)
    greedy = greedy_plan(load, S, P)
    fair = duplicates(greedy, P) == 0
    ours, theirs = (imbalance_of(load, table, P)[fair] for table in (slots, greedy))
    assert (ours <= theirs + 1e-6).all()


@pytest.mark.slow
def test_plans_of_windows_are_better_there_than_those_of_their_mean():
    windows = jnp.array(windows_of())
    share = windows / windows.sum(axis=2, keepdims=True)
    slots = jax.jit(lambda windows: fresh_windows(windows, ROOM, FEW))(windows)
    assert_whole(slots)
    of_mean = jnp.array(greedy_plan(np.asarray(share.mean(axis=0)), S, P), jnp.int32)
    planned, greedy = (float(score_even(windows, table, P).mean()) for table in (slots, of_mean))
    assert planned < 0.9 * greedy


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (None, [0, 1, 2, 0, 1, 2]),
        ([1.0, 0.0], [0, 1, 2, 3, 3, 3]),
    ],
)
def test_ranks_with_room_for_all_hold_all(capacity, expected):
    capacity = None if capacity is None else jnp.array(capacity)
    slots = every_expert_everywhere(2, 3, Room(6, 2, capacity, 1))
    assert slots.tolist() == [expected] * 2


def test_slots_beyond_all_experts_hold_them_again():
    assert every_expert_everywhere(1, 2, Room(6, 2, None, 1)).tolist() == [[0, 1, 0, 0, 1, 0]]
