import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb import Placement
from jax_eplb.kernels import top_k_sort
from jax_eplb.routing import order_by_slot, segment_of
from tests.placement_cases import random_table, seeds

pytestmark = pytest.mark.light_compile

E, S, RANKS, T, K = 5, 8, 4, 9, 2


@functools.cache
def ordered():
    @jax.jit
    def run(scores, mask, slot_tokens, tables):
        found = top_k_sort(scores, mask, K)
        return found.experts, order_by_slot(found, slot_tokens, tables)

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
    order = order_by_slot(found, jnp.zeros(S, jnp.int32), tables)
    assert (order.choice.shape, order.place.shape) == ((0,), (0, K))


@pytest.mark.slow
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_the_segment_of_an_index_is_the_first_that_ends_past_it(sizes):
    ends = np.cumsum(sizes).astype(np.int32)
    expected = np.repeat(np.arange(len(sizes)), sizes)
    found = segment_of(jnp.arange(24, dtype=jnp.int32), jnp.asarray(ends))
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (np.asarray(found)[len(expected) :] == len(sizes) - 1).all()
