import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_eplb.placement import Placement
from jax_eplb.split import count_replicas, even_split, rank_load

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
