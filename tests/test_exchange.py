import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.kernels import grouped_matmul
from jax_eplb.moe.exchange import exchange
from jax_eplb.moe.exchange_sizes import ExchangeSizes
from jax_eplb.routing import Ranks, SlotOrder
from tests.ragged_emulation import ragged_all_to_all

pytestmark = pytest.mark.light_compile

RANKS, PER_RANK, T, K, D = 4, 3, 10, 2, 5
SLOTS = RANKS * PER_RANK
WHOLE = T * K
ONE_WAVE = {
    "waves": ExchangeSizes("waves", (WHOLE,)),
    "waves, the lesser buffer where it does": ExchangeSizes("waves", (8, WHOLE)),
    "ragged": ExchangeSizes("ragged", (WHOLE,)),
    "all_gather": ExchangeSizes("all_gather", (T,)),
}
MANY_WAVES = {
    "waves of 1": ExchangeSizes("waves", (), 1),
    "waves of 3": ExchangeSizes("waves", (), 3),
    "waves of 3 where 8 are too few": ExchangeSizes("waves", (4, 8), 3),
    "ragged in waves of 3": ExchangeSizes("ragged", (), 3),
    "all_gather of 1 token": ExchangeSizes("all_gather", (), 1),
    "all_gather of 4 tokens": ExchangeSizes("all_gather", (), 4),
}
EVERY = ONE_WAVE | MANY_WAVES


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@pytest.fixture(autouse=True)
def unwritten_memory_holds_anything(monkeypatch):
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
        yield


def times_slot_weights(rows, weights, group_sizes):
    return grouped_matmul(rows, weights, group_sizes, implementation="blocked")


def order_of(slots, ranks):
    """The order by slot of slots [T, K]; S for padding."""
    flat = slots.reshape(-1)
    choice = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(flat).at[choice].set(jnp.arange(flat.size, dtype=jnp.int32))
    is_padding = flat >= SLOTS
    return SlotOrder(
        jnp.where(is_padding[choice], flat.size, choice),
        jnp.where(is_padding, flat.size, place).reshape(slots.shape),
        ranks.tell_all(jnp.zeros(SLOTS, jnp.int32).at[flat].add(1, mode="drop")),
    )


@functools.cache
def exchanger(sizes, ranks=RANKS):
    def local(tokens, weights, slots, params):
        on_axis = Ranks("expert", ranks, SLOTS // ranks)
        out, computed = exchange(
            times_slot_weights,
            sizes,
            on_axis,
            tokens,
            weights,
            order_of(slots, on_axis),
            params,
        )
        return out, computed[None]

    axis = P("expert")
    return jax.shard_map(local, mesh=expert_mesh(ranks), in_specs=axis, out_specs=axis)


@functools.cache
def results_and_gradients(sizes, ranks=RANKS):
    @jax.jit
    def run(tokens, weights, slots, params, cotangent):
        results, transpose, computed = jax.vjp(
            lambda tokens, weights, params: exchanger(sizes, ranks)(tokens, weights, slots, params),
            tokens,
            weights,
            params,
            has_aux=True,
        )
        return results, *transpose(cotangent), computed

    return run


def drawn(seed=0, padding=0.2):
    """Tokens, weights, slots (different ones for each token), parameters and a cotangent."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    slots = np.argsort(generator.random((RANKS * T, SLOTS)), axis=1)[:, :K].astype(np.int32)
    slots[generator.random(len(slots)) < padding] = SLOTS
    tokens, params, cotangent = (normal(RANKS * T, D), normal(SLOTS, D, D), normal(RANKS * T, D))
    return tokens, normal(RANKS * T, K), slots, params, cotangent


def by_numpy(tokens, weights, slots, params, cotangent):
    wide = (x.astype(np.float64) for x in (tokens, weights, params, cotangent))
    tokens, weights, params, cotangent = wide
    results, grad_tokens = np.zeros(cotangent.shape), np.zeros(tokens.shape)
    grad_weights, grad_params = np.zeros(weights.shape), np.zeros(params.shape)
    for (t, k), slot in np.ndenumerate(slots):
        if slot < SLOTS:
            result = tokens[t] @ params[slot]
            results[t] += weights[t, k] * result
            grad_tokens[t] += weights[t, k] * (params[slot] @ cotangent[t])
            grad_weights[t, k] = result @ cotangent[t]
            grad_params[slot] += weights[t, k] * np.outer(tokens[t], cotangent[t])
    return results, grad_tokens, grad_weights, grad_params, computed_by(slots)


def computed_by(slots):
    return np.bincount(slots[slots < SLOTS] // PER_RANK, minlength=RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_results_gradients_and_counts_are_numpys(name):
    arrays = drawn()
    found = results_and_gradients(EVERY[name])(*arrays)
    for got, expected in zip(found, by_numpy(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_way_to_travel_gives_the_same_bits(name):
    arrays = drawn(1)
    found = results_and_gradients(EVERY[name])(*arrays)
    plain = results_and_gradients(ONE_WAVE["waves"])(*arrays)
    for got, expected in zip(found[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(got, expected)
    # The weights' gradient is a sum over waves, so it may be rounded in another order.
    np.testing.assert_allclose(found[3], plain[3], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_dropped_when_every_token_goes_to_the_same_rank(name):
    tokens, weights, slots, params, cotangent = drawn(2)
    slots[:] = [7, 6]
    found = results_and_gradients(EVERY[name])(tokens, weights, slots, params, cotangent)
    expected = by_numpy(tokens, weights, slots, params, cotangent)
    for got, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-4)
    assert found[4].tolist() == [0, 0, RANKS * T * K, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_padding_is_neither_sent_nor_answered(name):
    tokens, weights, slots, params, cotangent = drawn(3)
    slots[:] = SLOTS
    tokens[:] = np.nan
    found = results_and_gradients(EVERY[name])(tokens, weights, slots, params, cotangent)
    for got in found:
        assert not np.asarray(got).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["waves", "waves of 3", "ragged", "all_gather of 4 tokens"])
def test_a_rank_without_tokens_still_serves_the_others(name):
    tokens, weights, slots, params, cotangent = drawn(4, padding=0)
    slots[:T] = SLOTS  # rank 0 has padding alone
    arrays = (tokens, weights, slots, params, cotangent)
    found, expected = results_and_gradients(EVERY[name])(*arrays), by_numpy(*arrays)
    for got, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
    assert found[4][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["waves of 3", "waves", "ragged", "all_gather"])
def test_fewer_ranks_give_the_same_bits(name, ranks):
    arrays = drawn(5)
    sizes = EVERY[name]
    more = RANKS // ranks  # tokens of a rank, times what it was
    sizes = sizes._replace(in_one_wave=tuple(more * size for size in sizes.in_one_wave))
    found = results_and_gradients(sizes, ranks)(*arrays)
    plain = results_and_gradients(ONE_WAVE["waves"])(*arrays)
    for got, expected in zip(found[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["waves, the lesser buffer where it does", "waves of 3"])
def test_parameters_may_hold_integers_which_have_no_gradient(name):
    tokens, weights, slots, params, cotangent = drawn(6)

    def local(tokens, weights, slots, stack, layer):
        def compute(rows, params, group_sizes):
            stack, layer = params
            return times_slot_weights(rows, stack[layer], group_sizes)

        ranks = Ranks("expert", RANKS, PER_RANK)
        order = order_of(slots, ranks)
        return exchange(compute, EVERY[name], ranks, tokens, weights, order, (stack, layer))[0]

    axis, bank = P("expert"), P(None, "expert")
    run = jax.shard_map(
        local, mesh=expert_mesh(RANKS), in_specs=(axis, axis, axis, bank, P()), out_specs=axis
    )

    @jax.jit
    def gradient(stack, layer):
        return jax.vjp(lambda stack: run(tokens, weights, slots, stack, layer), stack)[1](cotangent)

    (grad,) = gradient(np.stack([params + 1, params]), 1)
    expected = by_numpy(tokens, weights, slots, params, cotangent)[3]
    np.testing.assert_allclose(grad[1], expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(grad[0]).any()


def test_no_tokens_at_all_are_no_waves():
    sizes = (0, D), (0, K), (0, K), (SLOTS, D, D)
    kinds = np.float32, np.float32, np.int32, np.float32
    none = [np.ones(size, kind) for size, kind in zip(sizes, kinds, strict=True)]
    results, computed = jax.jit(exchanger(MANY_WAVES["waves of 1"]))(*none)
    assert results.shape == (0, D)
    assert computed.tolist() == [0] * RANKS
