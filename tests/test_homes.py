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
SHAPES = ((6, 10, 5), (8, 12, 4), (7, 16, 4), (5, 5, 1))


@functools.cache
def compiled(num_ranks: int):
    return jax.jit(functools.partial(home_slots, num_ranks=num_ranks))


def homes_of_ranks(home, num_slots: int, num_ranks: int) -> np.ndarray:
    return np.bincount(np.asarray(home) // (num_slots // num_ranks), minlength=num_ranks)


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), seeds)
def test_a_home_is_a_slot_of_its_expert_and_none_would_rather_be_elsewhere(shape, seed):
    experts, slots, ranks = shape
    generator = np.random.default_rng(seed)
    row = random_table(generator, 1, experts, slots, ranks)[0]
    held = [np.flatnonzero(row == expert) for expert in range(experts)]
    start = np.array([generator.choice(slots_of) for slots_of in held], np.int32)
    home = np.asarray(compiled(ranks)(row.astype(np.int32), start))
    np.testing.assert_array_equal(row[home], np.arange(experts))
    homes, per_rank = homes_of_ranks(home, slots, ranks), slots // ranks
    for expert, slots_of in enumerate(held):
        assert homes[home[expert] // per_rank] - homes[slots_of // per_rank].min() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_homes_are_as_even_as_any_choice_makes_them(seed):
    experts, slots, ranks = 8, 12, 4
    row = random_table(np.random.default_rng(seed), 1, experts, slots, ranks)[0]
    held = [np.flatnonzero(row == expert) for expert in range(experts)]
    best = min(homes_of_ranks(choice, slots, ranks).max() for choice in itertools.product(*held))
    start = np.array([slots_of[0] for slots_of in held], np.int32)
    home = compiled(ranks)(row.astype(np.int32), start)
    assert homes_of_ranks(home, slots, ranks).max() <= best + 1


def test_an_empty_slot_is_nobodys_home():
    row = np.array([0, 1, 2, 2, 3, 3], np.int32)  # of experts 0 to 2; 3 is empty
    home = compiled(3)(row, np.array([0, 1, 2], np.int32))
    assert home.tolist() == [0, 1, 2]
