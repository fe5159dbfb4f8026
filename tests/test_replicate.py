import itertools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_eplb.planner.replicate import replicate
from tests.greedy_reference import greedy_replicate

pytestmark = pytest.mark.light_compile


def replicas(load, num_slots, **options):
    return replicate(jnp.array([load], jnp.float32), num_slots, **options)[0].tolist()


# Whole numbers below 2^24 are exact in float32, so ties are real ties.
loads = arrays(np.int64, (3, 5), elements=st.integers(0, 1000))


@pytest.mark.parametrize(
    ("load", "num_slots", "expected"),
    [
        ([1, 2, 3, 4], 4, [1, 1, 1, 1]),
        ([0, 0, 0, 0], 6, [2, 2, 1, 1]),
        ([1, 4, 2, 1], 8, [1, 4, 2, 1]),
        ([10, 5, 2, 15, 8], 9, [2, 1, 1, 3, 2]),
        ([0, 10, 0], 4, [1, 2, 1]),
    ],
)
def test_golden_loads_get_these_replicas(load, num_slots, expected):
    assert replicas(load, num_slots) == expected


def test_ties_go_to_the_lowest_id():
    assert replicas([4, 4, 4], 5) == [2, 2, 1]


def test_experts_without_load_come_last_and_in_turn():
    assert replicas([0, 3, 0], 8, max_replicas=3) == [3, 3, 2]


def test_no_expert_passes_the_bound():
    assert replicas([100, 1, 2, 3], 8, max_replicas=3) == [3, 1, 2, 2]


def test_a_negative_offset_splits_more_experts():
    assert replicas([100, 45, 1, 1], 7) == [3, 2, 1, 1]
    assert replicas([100, 30, 1, 1], 6) == [3, 1, 1, 1]
    assert replicas([100, 40, 1, 1], 6, offset=-0.7) == [2, 2, 1, 1]


def test_slots_held_back_go_to_the_smallest_replicas():
    assert replicas([100, 30, 2, 1], 6, held_back=1) == [2, 1, 1, 2]


@given(loads)
def test_replication_is_the_exact_greedy(load):
    count = np.asarray(replicate(jnp.asarray(load, jnp.float32), 12, 4))
    for row, given_out in zip(load.tolist(), count.tolist(), strict=True):
        expected = [1] * 5
        for _ in range(12 - 5):
            claims = [
                (Fraction(w, c) if w else -c, -e)
                for e, (w, c) in enumerate(zip(row, expected, strict=True))
                if c < 4
            ]
            expected[-max(claims)[1]] += 1
        assert given_out == expected


@given(loads)
def test_no_replication_has_a_smaller_largest_replica(load):
    count = np.asarray(replicate(jnp.asarray(load, jnp.float32), 9))
    ways = [c for c in itertools.product(range(1, 6), repeat=5) if sum(c) == 9]
    least = (load[:, None] / np.array(ways)).max(axis=2).min(axis=1)
    np.testing.assert_allclose((load / count).max(axis=1), least, rtol=1e-6)


def test_many_layers_agree_with_numpy():
    load = np.random.default_rng(0).lognormal(0, 2, (6, 64)).astype(np.float32)
    np.testing.assert_array_equal(replicate(jnp.asarray(load), 96), greedy_replicate(load, 96))


def test_loads_of_a_billion_tokens_keep_every_slot():
    load = 10**9 - np.random.default_rng(1).integers(0, 100, (2, 50))
    count = replicate(jnp.asarray(load, jnp.float32), 70, 2)
    assert count.sum(axis=1).tolist() == [70, 70]
    assert count.min() == 1
    assert count.max() == 2


@pytest.mark.parametrize(("num_slots", "bound"), [(3, 4), (9, 2)])
def test_slots_that_cannot_be_given_out_are_refused(num_slots, bound):
    with pytest.raises(ValueError, match=rf"{num_slots} slots for 4 .* use 4 to {4 * bound}"):
        replicas([1, 2, 3, 4], num_slots, max_replicas=bound)
