import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.moe.experts import experts_in_order, init_experts, lecun_normal, place_experts
from tests.placement_cases import random_table, seeds

L, E, S, RANKS = 3, 6, 12, 4


def tagged(*shape):
    """float32[*shape]; every value names its layer, expert and position."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def spread(*spec):
    return NamedSharding(expert_mesh(RANKS), P(*spec))


@given(seeds)
def test_a_stack_of_banks_is_placed_slot_by_slot_and_read_back_in_expert_order(seed):
    table = random_table(np.random.default_rng(seed), L, E, S, RANKS)
    weights = tagged(L, E, 2, 3)
    placed = place_experts(weights, table, spread(None, "expert"))
    np.testing.assert_array_equal(placed, weights[np.arange(L)[:, None], table])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(L, S // RANKS, 2, 3)}
    np.testing.assert_array_equal(experts_in_order(placed, table, E), weights)


def test_one_layer_and_a_second_sharded_axis_work_alike():
    mesh = jax.make_mesh((2, 2), ("expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    (table,) = random_table(np.random.default_rng(0), 1, E, S, 2)
    weights = tagged(E, 4, 3)
    placed = place_experts(weights, table, NamedSharding(mesh, P("expert", "model")))
    np.testing.assert_array_equal(placed, weights[table])
    np.testing.assert_array_equal(experts_in_order(placed, table, E), weights)


def test_empty_slots_are_placed_and_not_read_back():
    table = np.arange(L * S).reshape(L, S)[:, ::-1] % E
    table[:, 3:6] = E
    weights = tagged(L, E, 2, 3)
    placed = place_experts(weights, table, spread(None, "expert"))
    filled = table < E
    rows = np.nonzero(filled)
    np.testing.assert_array_equal(np.asarray(placed)[rows], weights[rows[0], table[filled]])
    np.testing.assert_array_equal(experts_in_order(placed, table, E), weights)
    one = place_experts(weights[0], table[0], spread("expert"))
    np.testing.assert_array_equal(experts_in_order(one, table[0], E), weights[0])


def test_an_expert_on_no_device_is_named():
    table = np.arange(S) % E
    placed = place_experts(tagged(E, 2), table, spread("expert"))
    table[table == 4] = 3
    with pytest.raises(ValueError, match="expert 4 is on no device of this process"):
        experts_in_order(placed, table, E)


def test_fresh_weights_depend_on_the_expert_and_not_on_placement_or_devices():
    one = lecun_normal(3, (3, 2))
    made = []
    for ranks in (1, RANKS):
        (table,) = random_table(np.random.default_rng(ranks), 1, E, S, ranks)
        bank = init_experts(
            jax.random.key(0), jnp.asarray(table), one, expert_mesh(ranks), P("expert")
        )
        in_order = experts_in_order(bank, table, E)
        np.testing.assert_array_equal(bank, in_order[table])  # replicas are equal
        made.append(in_order)
    np.testing.assert_array_equal(*made)
    assert len(np.unique(made[0])) == made[0].size


def test_a_second_bank_of_the_same_shape_compiles_nothing():
    mesh, table = expert_mesh(RANKS), jnp.arange(S) % E
    before = None
    for seed in range(3):
        init_experts(jax.random.key(seed), table, lecun_normal(3, (3, 2)), mesh, P("expert"))
        before = before or init_experts._cache_size()
    assert init_experts._cache_size() == before


def test_the_initial_variance_is_one_over_the_inputs():
    weights = lecun_normal(50, (50, 400), jnp.bfloat16)(jax.random.key(1))
    assert weights.dtype == jnp.bfloat16
    assert np.asarray(weights, np.float32).var() == pytest.approx(1 / 50, rel=0.05)
