"""Scores: what the metrics say, in float32, with windows and capacities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jax_eplb.planner.score import even_heights, score_balanced, score_even
from tests.greedy_reference import imbalance_of
from tests.placement_cases import random_table

pytestmark = pytest.mark.light_compile

W, L, E, S, P = 3, 2, 6, 9, 3
CAPACITY = [1.0, 2.0, 0.0]


def problem():
    generator = np.random.default_rng(1)
    windows = generator.lognormal(0, 1, (W, L, E)).astype(np.float32)
    return windows, random_table(generator, L, E, S, P)


@functools.partial(jax.jit, static_argnums=0)
def compiled(score, load, table, capacity):
    return score(load, table, P, capacity)


def scores(score, load, table, capacity=(1.0,) * P):
    """float32[L]. One set of shapes, so that each score compiles once."""
    return np.asarray(compiled(score, jnp.array(load), jnp.array(table), jnp.array(capacity)))


def test_the_score_of_windows_is_the_mean_imbalance_of_those_with_tokens():
    windows, table = problem()
    alone = np.array([imbalance_of(window, table, P) for window in windows])
    np.testing.assert_allclose(scores(score_even, windows, table), alone.mean(axis=0), rtol=1e-5)
    windows[1, 0] = 0
    some = scores(score_even, windows, table)
    np.testing.assert_allclose(some, [alone[[0, 2], 0].mean(), alone[:, 1].mean()], rtol=1e-5)
    assert scores(score_even, 0 * windows, table).tolist() == [0, 0]


def test_one_load_is_one_window():
    windows, table = problem()
    one, only = (scores(score_even, load, table) for load in (windows[0], windows[:1]))
    np.testing.assert_allclose(one, only, atol=1e-5)


@pytest.mark.slow
def test_with_capacities_times_count():
    # Rank 0 holds 6 tokens, rank 1, twice as fast, 6: times 6 and 3, where 12 / 3 = 4 is perfect.
    load = np.zeros((W, L, E), np.float32)
    load[:, :, :2] = 6
    table = np.tile(np.array([0, 2, 3, 1, 4, 5, E, E, E], np.int32), (L, 1))
    for score in (score_even, score_balanced):
        assert scores(score, load, table, CAPACITY).tolist() == pytest.approx([0.5] * L)
    heights = even_heights(jnp.array(load), jnp.array(table), P, jnp.array(CAPACITY))
    assert heights[0, 0].tolist() == pytest.approx([6.0, 3.0, 0.0])


def least_height(load, row):
    """The fullest rank's tokens if each expert's are divided as well as can be."""
    rank = np.arange(S) * P // S
    ranks = np.c_[np.arange(P)[:, None] == rank, -np.ones(P)]
    experts = np.c_[np.arange(E)[:, None] == row, np.zeros(E)]
    return linprog(np.r_[np.zeros(S), 1], ranks, np.zeros(P), experts, load).fun


def test_the_balanced_score_is_that_of_a_linear_programme():
    windows, table = problem()
    best = [
        np.mean([least_height(w[layer], table[layer]) * P / w[layer].sum() for w in windows]) - 1
        for layer in range(L)
    ]
    np.testing.assert_allclose(scores(score_balanced, windows, table), best, atol=2e-3)
