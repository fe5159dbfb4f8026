import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from jax_eplb.placement import Placement
from jax_eplb.split import balanced_split, count_replicas, even_split, rank_load, sum_by_rank

pytestmark = pytest.mark.light_compile

SLOTS = np.array([[0, 1, 2, 0, 3, 0, 1, 2], [3, 2, 1, 0, 3, 3, 0, 3]])  # [L, S], E = 4
counts = arrays(np.int64, (3, 2, 4), elements=st.integers(0, 10**9))


def placement():
    return Placement.from_slots(SLOTS, num_experts=4, num_ranks=4)


def numpy_split(load):
    """float64[W, L, S]"""
    share = np.stack([load[:, i] / np.bincount(row) for i, row in enumerate(SLOTS)], axis=1)
    return np.stack([share[:, i, row] for i, row in enumerate(SLOTS)], axis=1)


def test_replicas_share_an_experts_tokens_equally():
    tokens = even_split(jnp.array([[6, 4, 2, 1], [1, 1, 1, 10]]), jnp.asarray(SLOTS), 4)
    assert tokens.tolist() == [[2, 2, 1, 2, 1, 2, 2, 1], [2.5, 1, 1, 0.5, 2.5, 2.5, 0.5, 2.5]]


@given(counts)
def test_split_agrees_with_numpy_for_every_window(load):
    np.testing.assert_allclose(even_split(load, SLOTS, 4), numpy_split(load), rtol=3e-7)


@given(counts)
def test_no_token_is_lost_or_invented(load):
    by_rank = np.asarray(rank_load(load, placement()), np.float64)
    assert by_rank.shape == (3, 2, 4)
    np.testing.assert_allclose(by_rank.sum(axis=-1), load.sum(axis=-1), rtol=1e-6)


def test_counts_past_32_bits_do_not_wrap_around():
    load = np.full((1, 2, 4), 2**40)
    np.testing.assert_allclose(rank_load(load, placement()).sum(axis=-1), 4 * 2.0**40)


def test_rank_load_works_under_jit_and_vmap():
    load = jnp.arange(24).reshape(3, 2, 4)
    eager = rank_load(load, placement())
    np.testing.assert_array_equal(jax.jit(rank_load)(load, placement()), eager)
    np.testing.assert_array_equal(jax.vmap(rank_load, (0, None))(load, placement()), eager)


def test_replicas_are_counted():
    assert count_replicas(jnp.asarray(SLOTS), 4).tolist() == [[3, 2, 2, 1], [2, 1, 1, 4]]


def test_a_load_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 5\); expected \[\.\.\., 2 layers, 4 exp"):
        even_split(jnp.ones((2, 5)), jnp.asarray(SLOTS), 4)


def lightest_fullest_rank(load, slots, capacity):
    """Tokens / capacity of the fullest rank, by linear programming over slots and that height."""
    num_ranks, num_slots = len(capacity), len(slots)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    ranks = np.zeros((num_ranks, num_slots + 1))
    ranks[rank, np.arange(num_slots)] = 1
    ranks[:, -1] = -capacity
    experts = np.zeros((len(load), num_slots + 1))
    used = slots < len(load)
    experts[slots[used], np.flatnonzero(used)] = 1
    goal = np.eye(num_slots + 1)[-1]
    bounds = [(0, None if use else 0) for use in used] + [(0, None)]
    return linprog(goal, ranks, np.zeros(num_ranks), experts, load, bounds=bounds).fun


def by_expert(tokens, slots, num_experts):
    return np.stack(
        [
            np.bincount(row, count, minlength=num_experts + 1)[:num_experts]
            for row, count in zip(np.asarray(slots), np.asarray(tokens, np.float64), strict=True)
        ]
    )


SPEEDS = [np.ones(4), np.array([1.0, 3, 0.5, 2]), np.array([1.0, 0, 2, 1])]


@pytest.mark.parametrize("capacity", SPEEDS)
def test_balanced_split_agrees_with_a_linear_programme(capacity):
    rng = np.random.default_rng(0)
    load = rng.lognormal(3, 1.5, (12, 6)).astype(np.float32)
    load[3] = 0
    load[4, :3] = 0
    slots = np.stack([np.concatenate([rng.permutation(6), rng.integers(6, size=6)]) for _ in load])
    empty = np.repeat(capacity == 0, 3)
    slots[:, ~empty][:, :6] = np.arange(6)
    for row in slots:
        row[np.flatnonzero(~empty)[:6]] = rng.permutation(6)
        row[empty] = 6
    tokens = balanced_split(load, slots, 6, 4, capacity=capacity)
    np.testing.assert_allclose(by_expert(tokens, slots, 6), load, rtol=1e-5)
    assert float(tokens.min()) >= 0
    assert not np.asarray(tokens)[:, empty].any()
    height = np.asarray(sum_by_rank(tokens, 4)) / np.where(capacity > 0, capacity, 1)
    best = [lightest_fullest_rank(*pair, capacity) for pair in zip(load, slots, strict=True)]
    mean = load.sum(axis=1) / capacity.sum()
    assert (height.max(axis=1) >= np.array(best) * (1 - 1e-5)).all()
    assert (height.max(axis=1) <= best + 2e-3 * mean + 1e-6).all()


@pytest.mark.slow
@given(counts)
def test_balanced_split_keeps_every_token_and_is_no_worse_than_the_even_one(load):
    tokens = balanced_split(load, SLOTS, 4, 4)
    assert tokens.shape == (3, 2, 8)
    for window, whole in zip(np.asarray(tokens), load, strict=True):
        np.testing.assert_allclose(by_expert(window, SLOTS, 4), whole, rtol=1e-5)
    even = np.asarray(rank_load(load, placement())).max(axis=-1)
    assert (np.asarray(sum_by_rank(tokens, 4)).max(axis=-1) <= even * (1 + 1e-5)).all()


def test_balanced_split_does_nothing_where_no_expert_has_two_slots():
    slots = jnp.arange(4)[None]
    load = jnp.array([[4.0, 3, 2, 1]])
    assert balanced_split(load, slots, 4, 2).tolist() == load.tolist()


@pytest.mark.slow
def test_balanced_split_is_not_recompiled_for_other_tables():
    split = jax.jit(lambda load, slots: balanced_split(load, slots, 4, 4))
    load = jnp.arange(8.0).reshape(2, 4)
    split(load, jnp.asarray(SLOTS))
    split(load, jnp.asarray(SLOTS[::-1]))
    assert split._cache_size() == 1


def test_balanced_split_refuses_slots_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="8 slots cannot be dealt evenly to 3 ranks"):
        balanced_split(jnp.ones((2, 4)), jnp.asarray(SLOTS), 4, 3)
