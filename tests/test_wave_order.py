import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.moe.wave_order import wave_order_by_xla
from jax_eplb.moe.wave_order_kernel import wave_order_by_kernel
from jax_eplb.routing import SlotOrder, SlotTokens
from tests.gpu_programs import lowered_for_gpu
from tests.placement_cases import seeds

pytestmark = pytest.mark.light_compile

# (ranks, slots of each, tokens, choices of each, rows of a pair in a wave): of two programs, too.
SHAPES = ((2, 3, 9, 2, 18), (3, 2, 5, 3, 4), (4, 5, 300, 4, 130))


def drawn(shape, seed):
    """A rank's order by slot, and what all ranks send; some tokens are padding."""
    ranks, per_rank, tokens, top_k, _ = shape
    generator = np.random.default_rng(seed)
    slots = ranks * per_rank
    weights = generator.gamma(0.3, size=slots) + 1e-9
    merits = np.log(weights) + generator.gumbel(size=(ranks, tokens, slots))
    chosen = np.argsort(-merits, axis=2)[..., :top_k]
    chosen[generator.random((ranks, tokens)) < 0.2] = slots
    flat = chosen.reshape(ranks, -1)
    of_all = np.stack([np.bincount(x, minlength=slots + 1)[:slots] for x in flat]).astype(np.int32)
    rank = int(generator.integers(ranks))
    order = np.argsort(flat[rank], kind="stable").astype(np.int32)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    padding = flat[rank] == slots
    choice = np.where(padding[order], order.size, order).astype(np.int32)
    place = np.where(padding, order.size, place).reshape(tokens, top_k).astype(np.int32)
    return SlotOrder(choice, place, SlotTokens(of_all[rank], of_all)), jnp.int32(rank)


@functools.cache
def both(capacity):
    on_cpu = jax.default_backend() == "cpu"
    return (
        jax.jit(functools.partial(wave_order_by_xla, capacity=capacity)),
        jax.jit(functools.partial(wave_order_by_kernel, capacity=capacity, interpret=on_cpu)),
    )


@given(shape=st.sampled_from(SHAPES), seed=seeds, wave=st.integers(0, 2))
def test_the_kernel_gives_the_same_order(shape, seed, wave):
    capacity = shape[-1]
    arrays = drawn(shape, seed)
    first = jnp.int32(wave * capacity)
    expected, ours = (run(*arrays, first) for run in both(capacity))
    for name in ("choice", "place", "group_sizes"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
    computed = int(expected.group_sizes.sum())
    np.testing.assert_array_equal(ours.arrival[:computed], expected.arrival[:computed])
    # Of departures, those of rows that hold something are read.
    holds = np.asarray(expected.arrival[:computed])
    np.testing.assert_array_equal(ours.departure[holds], np.arange(computed))
    for rows in (ours.arrival, ours.departure):
        assert np.asarray(rows).min() >= 0
        assert np.asarray(rows).max() < shape[0] * capacity


@pytest.mark.slow
# JAX 0.12 says that it will drop this backend one day; until then it is what lowers these kernels.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_it_lowers_for_a_gpu():
    arrays = (*drawn(SHAPES[0], 0), jnp.int32(0))
    run = jax.jit(functools.partial(wave_order_by_kernel, capacity=18))
    text = lowered_for_gpu(run, *arrays)
    assert text.count("xla.gpu.triton") == 1
