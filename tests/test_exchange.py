import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.kernels import grouped_matmul
from jax_eplb.moe.exchange import ExchangeGrid, exchange

RANKS, PER_RANK, T, K, D = 4, 3, 10, 2, 5
SLOTS = RANKS * PER_RANK
ENOUGH = T * K


def times_slot_weights(rows, weights, group_sizes):
    return grouped_matmul(rows, weights, group_sizes, implementation="blocked")


@functools.cache
def exchanger(capacity, ranks=RANKS):
    grid = ExchangeGrid("expert", ranks, SLOTS // ranks, capacity)

    def local(rows, slots, weights):
        results, computed = exchange(times_slot_weights, grid, rows, slots, weights)
        return results, computed[None]

    axis = P("expert")
    return jax.shard_map(
        local, mesh=expert_mesh(ranks), in_specs=(axis, axis, axis), out_specs=(axis, axis)
    )


@functools.cache
def results_and_gradients(capacity, ranks=RANKS):
    @jax.jit
    def run(rows, slots, weights, cotangent):
        results, transpose, computed = jax.vjp(
            lambda rows, weights: exchanger(capacity, ranks)(rows, slots, weights),
            rows,
            weights,
            has_aux=True,
        )
        return results, *transpose(cotangent), computed

    return run


def drawn(seed=0, padding=0.2):
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    slots = generator.integers(0, SLOTS, (RANKS * T, K)).astype(np.int32)
    slots[generator.random(len(slots)) < padding] = SLOTS
    return normal(RANKS * T, D), slots, normal(SLOTS, D, D), normal(RANKS * T, K, D)


def by_numpy(rows, slots, weights, cotangent):
    rows, weights, cotangent = (x.astype(np.float64) for x in (rows, weights, cotangent))
    results, grad_rows = np.zeros(cotangent.shape), np.zeros(rows.shape)
    grad_weights = np.zeros(weights.shape)
    for (t, k), slot in np.ndenumerate(slots):
        if slot < SLOTS:
            results[t, k] = rows[t] @ weights[slot]
            grad_rows[t] += weights[slot] @ cotangent[t, k]
            grad_weights[slot] += np.outer(rows[t], cotangent[t, k])
    return results, grad_rows, grad_weights, computed_by(slots)


def computed_by(slots):
    return np.bincount(slots[slots < SLOTS] // PER_RANK, minlength=RANKS)


@pytest.mark.parametrize("capacity", [1, 3, ENOUGH])
def test_results_gradients_and_counts_are_numpys(capacity):
    arrays = drawn()
    found = results_and_gradients(capacity)(*arrays)
    for got, expected in zip(found, by_numpy(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 3])
def test_many_waves_give_the_bits_of_one(capacity):
    arrays = drawn(1)
    many, one = results_and_gradients(capacity)(*arrays), results_and_gradients(ENOUGH)(*arrays)
    np.testing.assert_array_equal(many[0], one[0])
    np.testing.assert_array_equal(many[1], one[1])
    # The weights' gradient is a sum over waves, so it is rounded in another order.
    np.testing.assert_allclose(many[2], one[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 3, ENOUGH])
def test_nothing_is_dropped_when_every_token_goes_to_one_slot(capacity):
    rows, slots, weights, cotangent = drawn(2)
    slots[:] = 7
    found = results_and_gradients(capacity)(rows, slots, weights, cotangent)
    for got, expected in zip(found, by_numpy(rows, slots, weights, cotangent), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    assert found[3].tolist() == [0, 0, RANKS * T * K, 0]


def test_padding_is_neither_sent_nor_answered():
    rows, slots, weights, cotangent = drawn(3)
    slots[:] = SLOTS
    rows[:] = np.nan
    results, grad_rows, grad_weights, computed = results_and_gradients(3)(
        rows, slots, weights, cotangent
    )
    assert not np.asarray(results).any()
    assert not np.asarray(grad_rows).any()
    assert not np.asarray(grad_weights).any()
    assert not np.asarray(computed).any()


def test_a_rank_without_tokens_still_serves_the_others():
    rows, slots, weights, cotangent = drawn(4, padding=0)
    slots[T : 2 * T] = SLOTS
    found = results_and_gradients(3)(rows, slots, weights, cotangent)
    np.testing.assert_allclose(found[0], by_numpy(rows, slots, weights, cotangent)[0], atol=1e-5)
    assert found[3].tolist() == computed_by(slots).tolist()
    assert found[3][1] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bits_do_not_depend_on_the_number_of_ranks(ranks):
    arrays = drawn(5)
    few, four = results_and_gradients(3, ranks)(*arrays), results_and_gradients(3)(*arrays)
    np.testing.assert_array_equal(few[0], four[0])
    np.testing.assert_array_equal(few[1], four[1])
    np.testing.assert_array_equal(few[3], np.reshape(four[3], (ranks, -1)).sum(axis=1))


def test_no_tokens_at_all_are_no_waves():
    rows, slots = jnp.zeros((0, D)), jnp.zeros((0, K), jnp.int32)
    results, computed = exchanger(1)(rows, slots, jnp.ones((SLOTS, D, D)))
    assert results.shape == (0, K, D)
    assert computed.tolist() == [0] * RANKS
