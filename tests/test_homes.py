import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_eplb.homes import home_slots
from tests.placement_cases import random_table, seeds

pytestmark = pytest.mark.light_compile

# (E, S, P): few, as each compiles anew.
SHAPES = ((6, 10, 5), (8, 12, 4), (6, 16, 4), (9, 15, 3), (5, 5, 1))


@functools.cache
def compiled(num_ranks: int):
    return jax.jit(functools.partial(home_slots, num_ranks=num_ranks))


def slots_of_experts(row, num_experts: int) -> list[np.ndarray]:
    return [np.flatnonzero(row == expert) for expert in range(num_experts)]


def most_homes(home, num_slots: int, num_ranks: int) -> int:
    return np.bincount(np.asarray(home) // (num_slots // num_ranks)).max()


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), seeds)
def test_no_choice_of_homes_has_fewer_on_the_fullest_rank(shape, seed):
    experts, slots, ranks = shape
    generator = np.random.default_rng(seed)
    row = random_table(generator, 1, experts, slots, ranks)[0]
    held = slots_of_experts(row, experts)
    start = np.array([generator.choice(slots_of) for slots_of in held], np.int32)
    home = np.asarray(compiled(ranks)(row.astype(np.int32), start))
    np.testing.assert_array_equal(row[home], np.arange(experts))
    best = min(most_homes(choice, slots, ranks) for choice in itertools.product(*held))
    assert most_homes(home, slots, ranks) == best


def test_a_home_makes_way_for_another():
    # Rank 0 has three homes too many for rank 1 alone to take: one of rank 1's goes to rank 2.
    row = np.array([0, 1, 2, 2, 3, 4, 4, 5, 0], np.int32)
    home = compiled(3)(row, np.array([0, 1, 2, 4, 5, 7], np.int32))
    assert np.bincount(np.asarray(home) // 3).tolist() == [2, 2, 2]


def test_an_empty_slot_is_nobodys_home():
    row = np.array([0, 1, 2, 2, 3, 3], np.int32)  # of experts 0 to 2; 3 is empty
    home = compiled(3)(row, np.array([0, 1, 2], np.int32))
    assert home.tolist() == [0, 1, 2]
