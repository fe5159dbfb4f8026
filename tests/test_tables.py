import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jax_eplb import Placement
from jax_eplb.tables import derive_tables, leveling_scale, max_replicas, max_replicated_slots
from tests.placement_cases import random_table, seeds, sizes

pytestmark = pytest.mark.light_compile


@given(sizes, seeds)
def test_the_tables_are_what_numpy_derives(drawn, seed):
    (experts, slots, ranks), layers = drawn, 3
    table = random_table(np.random.default_rng(seed), layers, experts, slots, ranks)
    placement = Placement.from_slots(table, num_experts=experts, num_ranks=ranks)
    expected = np.full((layers, experts, max_replicas(experts, slots, ranks)), slots)
    for layer, row in enumerate(table):
        for expert in range(experts):
            held = np.flatnonzero(row == expert)
            expected[layer, expert, : len(held)] = held
    tables = placement.tables()
    assert {table.dtype for table in tables[:-2]} == {jnp.dtype("int32")}
    np.testing.assert_array_equal(tables.handicap, np.zeros((layers, ranks)))
    by_expert = np.argsort(table, axis=1, kind="stable")
    np.testing.assert_array_equal(tables.slot_to_expert, table)
    np.testing.assert_array_equal(tables.slots_by_expert, by_expert)
    bound = max_replicated_slots(experts, slots)
    assert tables.leveling.shape == (layers, 0, 0)
    leveled = jax.eval_shape(lambda: placement.tables(with_leveling=True))  # compiles nothing
    assert leveled.leveling.shape == (layers, bound, bound)
    for row, order, found in zip(table, by_expert, tables.replicated_slots, strict=True):
        several = order[np.bincount(row)[row[order]] > 1]
        expected_row = np.full(bound, slots)
        expected_row[: len(several)] = several
        np.testing.assert_array_equal(found, expected_row)
    np.testing.assert_array_equal(tables.first_slot, expected[..., 0])
    np.testing.assert_array_equal(tables.replica_count, (expected < slots).sum(axis=2))
    for row, slots_of, index in zip(table, expected, tables.replica_index, strict=True):
        for expert, held in enumerate(slots_of):
            held, turn = held[held < slots], index[row == expert]
            assert turn.argmin() == -turn[0] % len(held)  # the home
            np.testing.assert_array_equal(turn, (np.arange(len(held)) + turn[0]) % len(held))


@given(sizes, seeds)
def test_leveling_is_the_pseudo_inverse_of_what_shifts_cost(drawn, seed):
    experts, slots, ranks = drawn
    table = random_table(np.random.default_rng(seed), 1, experts, slots, ranks)
    placement = Placement.from_slots(table, num_experts=experts, num_ranks=ranks)
    tables = placement.tables(with_leveling=True).of_layer(0)
    slot = np.asarray(tables.replicated_slots)
    used, slot = slot < slots, slot[slot < slots]
    expert, rank = table[0][slot], slot // (slots // ranks)
    same_rank = (rank[:, None] == rank).astype(float)
    scale = np.asarray(leveling_scale(same_rank.sum(axis=0)))
    keeps_sums = np.array([(expert == e) / scale for e in np.unique(expert)])  # [replicated, J]
    keep = np.eye(len(slot))
    if slot.size:
        keep -= np.linalg.pinv(keeps_sums) @ keeps_sums
    hessian = np.eye(len(slot)) + same_rank / np.outer(scale, scale)
    expected = np.zeros((used.size, used.size))
    expected[np.ix_(used, used)] = np.linalg.pinv(keep @ hessian @ keep, rcond=1e-6)
    np.testing.assert_allclose(tables.leveling, expected, atol=3e-6)


def test_they_are_derived_without_a_library_that_has_threads_of_its_own():
    """Where several processes share a machine, LAPACK's wait for each other, and serving for it."""
    lowered = derive_tables.lower(
        jnp.zeros((2, 288), jnp.int32), num_experts=256, num_ranks=72, with_leveling=True
    )
    assert "lapack" not in lowered.as_text()
    assert "lapack" in jax.jit(jnp.linalg.inv).lower(jnp.eye(72)).as_text()


@pytest.mark.parametrize("num_slots", [20, 10])  # without replicas some tables have no entries
def test_one_array_holds_all_tables_of_a_layer(num_slots):
    table = random_table(np.random.default_rng(3), 3, 10, num_slots, 5)
    tables = Placement.from_slots(table, num_experts=10, num_ranks=5).tables(with_leveling=True)
    rows, tables_of = tables.in_one_array()
    for layer, row in enumerate(rows):
        for ours, expected in zip(tables_of(row), tables.of_layer(layer), strict=True):
            assert ours.dtype == expected.dtype
            np.testing.assert_array_equal(ours, expected)


def test_tables_of_two_placements_of_one_shape_compile_once():
    before = None
    for seed in range(2):
        table = random_table(np.random.default_rng(seed), 3, 11, 20, 5)
        Placement.from_slots(table, num_experts=11, num_ranks=5).tables()
        before = before or derive_tables._cache_size()
    assert derive_tables._cache_size() == before


def test_the_bound_on_replicas_allows_one_per_rank_and_leaves_a_slot_to_every_expert():
    assert max_replicas(num_experts=8, num_slots=32, num_ranks=4) == 4
    assert max_replicas(num_experts=8, num_slots=9, num_ranks=3) == 2
    assert max_replicas(num_experts=1, num_slots=6, num_ranks=2) == 6
