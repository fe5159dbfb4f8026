"""Pairs: counts that make the tallest pair lower, against all counts there are."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.pairs import improve_pairs
from jax_eplb.planner.replicate import replicate

pytestmark = pytest.mark.light_compile

# Ten slots of five ranks; as many layers in every call.
L, E, S = 24, 6, 10


def tallest(load, count):
    """The largest replica with the smallest, and so on: float64."""
    sizes = np.sort(np.repeat(load / count, count))
    return (sizes + sizes[::-1]).max()


def improve(load, count, num_tries, least=1):
    sizes = {"num_slots": S, "max_replicas": S // 2, "num_tries": num_tries, "least": least}
    return np.asarray(improve_pairs(jnp.array(load), jnp.array(count), **sizes))


def start_of(load):
    return np.asarray(replicate(load, S, S // 2))


@pytest.mark.slow
def test_the_tallest_pair_is_never_taller_and_mostly_as_low_as_any_counts_make_it():
    load = np.random.default_rng(0).lognormal(0, 1, (L, E)).astype(np.float32)
    start = start_of(load)
    count = improve(load, start, 60)
    assert (count.sum(axis=1) == S).all()
    assert (count >= 1).all()
    assert (count <= S // 2).all()
    before, after = (
        np.array([tallest(*row) for row in zip(load, c, strict=True)]) for c in (start, count)
    )
    assert (after <= before * (1 + 1e-6)).all()
    every = [np.array(c) for c in itertools.product(range(1, 6), repeat=E) if sum(c) == S]
    best = np.array([min(tallest(row, c) for c in every) for row in load])
    assert (after >= best * (1 - 1e-6)).all()
    assert (after / best).mean() < 1.01


@pytest.mark.parametrize("load", [np.zeros((L, E)), np.eye(L, E) * 1e9])
def test_no_load_and_one_hot_expert_leave_valid_counts(load):
    load = load.astype(np.float32)
    count = improve(load, start_of(load), 60)
    assert (count.sum(axis=1) == S).all()
    assert (count >= 1).all()


def test_no_expert_falls_below_the_least():
    # Two each is all there is, though one is hotter by far.
    load = np.array([[9.0, 1, 1, 1, 1]] * 2, np.float32)
    assert improve(load, np.full((2, 5), 2), 30, least=2).tolist() == [[2] * 5] * 2
