"""The bound: never above what brute force over all placements reaches."""

import functools
import itertools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.bound import lower_bound


def bound(loads, num_slots, num_ranks) -> list[float]:
    table = jnp.array(loads, jnp.float32)
    return lower_bound(table, num_slots=num_slots, num_ranks=num_ranks).tolist()


@functools.cache
def complete_tables(num_experts: int, num_slots: int) -> np.ndarray:
    """Every way to fill the slots that leaves no expert out, int64[N, S]."""
    tables = itertools.product(range(num_experts), repeat=num_slots)
    return np.array([table for table in tables if len(set(table)) == num_experts])


def optimum(load, num_slots, num_ranks) -> Fraction:
    """The least imbalance of any placement under the even split."""
    tables = complete_tables(len(load), num_slots)
    replicas = (tables[:, :, None] == np.arange(len(load))[None, None]).sum(1)  # [N, E]
    common = math.lcm(*range(1, num_slots + 1))  # every share is a whole number of these parts
    shares = np.take_along_axis(np.array(load) * common // replicas, tables, 1)  # [N, S]
    fullest = shares.reshape(len(tables), num_ranks, -1).sum(2).max(1).min()
    total = sum(load)
    return Fraction(int(fullest) * num_ranks, total * common) - 1 if total else Fraction(0)


SIZES = [(1, 3, 3), (2, 4, 2), (2, 6, 3), (3, 4, 2), (3, 6, 3), (4, 4, 2), (4, 6, 2), (4, 6, 3)]


@pytest.mark.parametrize(("num_experts", "num_slots", "num_ranks"), SIZES)
def test_the_bound_never_exceeds_the_optimum(num_experts, num_slots, num_ranks):
    generator = np.random.default_rng(10 * num_experts + num_ranks)
    loads = generator.integers(0, 10, (8, num_experts))
    loads[4:, 0] *= 10  # one hot expert, whose replicas set the bound
    found = bound(loads, num_slots, num_ranks)
    best = [float(optimum(load, num_slots, num_ranks)) for load in loads.tolist()]
    # float32 against exact fractions
    assert (np.array(found) <= np.array(best) + 1e-6).all(), (loads, found, best)
    assert min(found) >= 0


def test_a_hot_expert_alone_makes_the_bound_the_optimum():
    # Two replicas of 12, each beside one of 3.
    assert optimum([24, 3, 3], 4, 2) == 0
    assert bound([[24, 3, 3]], 4, 2) == [0.0]
    # No slot to spare: one rank has 24, where the mean is 10.
    assert optimum([24, 3, 3], 3, 3) == Fraction(24, 10) - 1
    assert bound([[24, 3, 3]], 3, 3) == pytest.approx([1.4])


@pytest.mark.parametrize(
    ("load", "num_slots", "num_ranks", "by_hand"),
    [
        # Replicas 2, 1, 1: the largest replica is 60 / 2 = 30, the mean 80 / 4 = 20.
        ([60, 10, 10], 4, 4, 0.5),
        # Replicas 3, 2, 1: all of 12, and the mean, 72 / 3 = 24, is more.
        ([36, 24, 12], 6, 3, 0.0),
        # Replicas 2, 2, 1: the largest is 90 / 2 = 45, the mean 200 / 5 = 40.
        ([90, 70, 40], 5, 5, 0.125),
    ],
)
def test_the_bound_is_what_a_hand_computes(load, num_slots, num_ranks, by_hand):
    assert bound([load], num_slots, num_ranks) == pytest.approx([by_hand])


def test_even_loads_have_a_bound_of_zero():
    assert bound([[7] * 4, [1] * 4, [1000] * 4], 4, 2) == [0.0] * 3
    assert bound([[7] * 4], 8, 4) == [0.0]


def test_no_load_has_a_bound_of_zero():
    assert bound([[0] * 4], 4, 2) == [0.0]
