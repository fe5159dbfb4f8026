import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb import Placement
from jax_eplb.kernels import top_k_sort
from jax_eplb.routing import SlotTokens, order_by_slot, segment_of
from jax_eplb.routing.even import even_share
from jax_eplb.routing.slot_order import order_by_xla
from jax_eplb.routing.slot_order_kernel import order_by_kernel
from tests.gpu_programs import lowered_for_gpu
from tests.placement_cases import random_table, seeds

pytestmark = pytest.mark.light_compile

E, S, RANKS, T, K = 5, 8, 4, 9, 2


@functools.cache
def ordered():
    @jax.jit
    def run(scores, mask, slot_tokens, tables):
        found = top_k_sort(scores, mask, K)
        told = SlotTokens(slot_tokens, slot_tokens[None])
        return found.experts, order_by_slot(found, told, tables)

    return run


@given(seed=seeds, padding=st.sampled_from([0.0, 0.3, 1.0]))
def test_each_slot_gets_its_number_of_its_experts_choices(seed, padding):
    generator = np.random.default_rng(seed)
    scores = generator.random((T, E)).astype(np.float32)
    experts = np.argsort(-scores, axis=1)[:, :K]
    mask = generator.random(T) >= padding
    (table,) = random_table(generator, 1, E, S, RANKS)
    tables = Placement.from_slots(table[None], num_experts=E, num_ranks=RANKS).tables()
    tables = tables.of_layer(0)
    counts = np.bincount(experts[mask].ravel(), minlength=E)
    slot_tokens = np.zeros(S, np.int32)
    for expert in range(E):  # any division among its slots
        slots = np.flatnonzero(table == expert)
        shares = np.full(len(slots), 1 / len(slots))
        slot_tokens[slots] = generator.multinomial(counts[expert], shares)

    chosen, order = ordered()(scores, mask, slot_tokens, tables)
    np.testing.assert_array_equal(chosen, experts)
    total = int(slot_tokens.sum())
    choice, place = np.asarray(order.choice), np.asarray(order.place)
    assert sorted(choice[:total].tolist()) == np.flatnonzero(np.repeat(mask, K)).tolist()
    assert (choice[total:] == T * K).all()
    served = table[np.repeat(np.arange(S), slot_tokens)]  # the expert at each place of the order
    np.testing.assert_array_equal(experts.ravel()[choice[:total]], served)
    np.testing.assert_array_equal(place[mask].ravel()[np.argsort(place[mask].ravel())],
                                  np.arange(total))  # fmt: skip
    np.testing.assert_array_equal(choice[place[mask].ravel()], np.flatnonzero(np.repeat(mask, K)))
    assert (place[~mask] == T * K).all()


def test_no_tokens_have_an_order_too():
    tables = Placement.default(num_experts=E, num_slots=S, num_ranks=RANKS).tables()
    tables = tables.of_layer(0)
    found = top_k_sort(jnp.zeros((0, E)), jnp.zeros(0, bool), K)
    nothing = jnp.zeros(S, jnp.int32)
    order = order_by_slot(found, SlotTokens(nothing, nothing[None]), tables)
    assert (order.choice.shape, order.place.shape) == ((0,), (0, K))


@pytest.mark.parametrize(("num_tokens", "num_slots"), [(5, 8), (700, 37)])  # of two programs, too
def test_the_kernel_gives_the_same_order(num_tokens, num_slots):
    generator = np.random.default_rng(num_slots)
    experts, per_token = num_slots - 3, 3
    (table,) = random_table(generator, 1, experts, num_slots, 1)
    tables = Placement.from_slots(table[None], num_experts=experts, num_ranks=1).tables()
    tables = tables.of_layer(0)
    scores = generator.random((num_tokens, experts)).astype(np.float32)
    found = top_k_sort(scores, generator.random(num_tokens) < 0.8, per_token)
    slot_tokens = even_share(found.expert_tokens, tables, jnp.int32(0))
    arrays = found.place, slot_tokens, tables.slots_by_expert
    by_kernel = order_by_kernel(*arrays, interpret=jax.default_backend() == "cpu")
    for ours, expected in zip(by_kernel, order_by_xla(*arrays), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
# JAX 0.12 says that it will drop this backend one day; until then it is what lowers these kernels.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_on_a_gpu_it_is_one_kernel():
    tables = Placement.default(num_experts=E, num_slots=S, num_ranks=RANKS).tables()
    run = ordered()
    arrays = jnp.zeros((T, E)), jnp.ones(T, bool), jnp.zeros(S, jnp.int32), tables.of_layer(0)
    text = lowered_for_gpu(run, *arrays)
    assert text.count("order_by_slot") >= 1


@pytest.mark.slow
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_the_segment_of_an_index_is_the_first_that_ends_past_it(sizes):
    ends = np.cumsum(sizes).astype(np.int32)
    expected = np.repeat(np.arange(len(sizes)), sizes)
    found = segment_of(jnp.arange(24, dtype=jnp.int32), jnp.asarray(ends))
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (np.asarray(found)[len(expected) :] == len(sizes) - 1).all()
