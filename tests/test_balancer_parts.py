"""Moves in parts, what moving costs, and the effect of updates: the balancer's small pieces."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh, metrics
from jax_eplb.moving import Moves, find_banks
from jax_eplb.online.effect import Effects
from jax_eplb.online.measure import bytes_of_slot, measure_bytes_per_second
from jax_eplb.online.parts import in_parts
from tests.test_events import UPDATE


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=40), st.integers(1, 4))
def test_parts_hold_every_move_once_and_no_rank_sends_or_gets_too_many(pairs, most):
    source, destination = (np.array([pair[i] for pair in pairs], int) for i in (0, 1))
    moves = Moves(np.arange(len(pairs)), source, destination)
    parts = in_parts(moves, slots_per_rank=4, most=most)
    seen = [np.array([], int)] + [part.layer for part in parts]
    assert sorted(np.concatenate(seen).tolist()) == list(range(len(pairs)))
    for part in parts:
        assert part.layer.size
        assert np.bincount(part.source // 4).max() <= most
        assert np.bincount(part.destination // 4).max() <= most


def test_rows_from_the_host_are_sent_by_no_rank():
    moves = Moves(np.zeros(4, int), np.array([~0, ~1, ~2, 0]), np.array([4, 8, 12, 5]))
    parts = in_parts(moves, slots_per_rank=4, most=1)
    assert [part.destination.tolist() for part in parts] == [[4, 8, 12], [5]]


def stacked(num_slots=8):
    mesh = expert_mesh(4)
    bank = NamedSharding(mesh, P(None, "expert"))
    shapes = {"up": ((3, num_slots, 5, 2), np.float32), "scale": ((3, num_slots), np.int8)}
    params = {
        name: jax.device_put(np.ones(shape, dtype), bank) for name, (shape, dtype) in shapes.items()
    }
    return params | {"router": np.ones((5, 8))}


def test_the_bytes_of_a_slot_are_those_of_all_its_arrays():
    params = stacked()
    assert bytes_of_slot(params, find_banks(params)) == 4 * 10 + 1
    layers = [{"up": stacked()["up"][0]} for _ in range(3)]
    assert bytes_of_slot(layers, find_banks(layers)) == 4 * 10


def test_the_speed_of_moving_is_measured_and_nothing_moves():
    params = stacked()
    before = jax.tree.map(np.asarray, params)
    assert measure_bytes_per_second(params, find_banks(params)) > 0
    for name, array in params.items():
        np.testing.assert_array_equal(array, before[name])


def measure(effects: Effects, iteration: int, rank_tokens, capacity=None):
    imbalance = metrics.imbalance(rank_tokens, capacity)
    return effects.measure(iteration, imbalance, rank_tokens.sum(axis=1))


def test_an_update_is_told_with_the_means_before_and_after():
    effects = Effects(2)
    even, skewed = np.array([[5, 5], [5, 5]]), np.array([[10, 0], [6, 4]])
    told = []
    for iteration in range(30):
        if iteration == 9:
            effects.expect(0, dataclasses.replace(UPDATE, step=12))
        told += measure(effects, iteration, skewed if iteration < 12 else even)
    assert [(u.step, u.imbalance_before, u.imbalance_after) for u in told] == [(12, 1.0, 0.0)]
    assert list(effects.close()) == []


def test_an_updates_effect_is_one_on_the_ranks_times():
    effects = Effects(1)
    effects.expect(0, dataclasses.replace(UPDATE, step=1))
    for tokens in ([10, 10], [15, 5]):
        assert list(measure(effects, 0, np.array([tokens]), np.array([3.0, 1.0]))) == []
        effects.hasten([0], 0)
    (update,) = effects.close()
    assert (update.imbalance_before, update.imbalance_after) == (1.0, 0.0)


def test_an_update_that_is_followed_by_another_or_the_end_is_told_with_what_there_was():
    effects = Effects(1)
    skewed, empty = np.array([[10, 0]]), np.array([[0, 0]])
    for step in (0, 2, 6):
        effects.expect(0, dataclasses.replace(UPDATE, step=step))
    told = []
    for iteration in range(6):
        told += measure(effects, iteration, skewed if iteration < 4 else empty)
    assert [(u.step, u.imbalance_before, u.imbalance_after) for u in told] == [(0, None, 1.0)]
    told = list(effects.close())
    assert [(u.step, u.imbalance_before, u.imbalance_after) for u in told] == [(2, 1.0, 1.0)]
    effects.forget()
    assert list(measure(effects, 6, skewed)) == []


def test_updates_that_are_overtaken_come_into_force_before():
    effects = Effects(4)
    for position, step in ((0, 5), (1, 6), (2, 6), (3, 7)):
        update = dataclasses.replace(UPDATE, step=step, decided_at=step - 4, layer=position)
        effects.expect(position, update)
    effects.hasten([1], 4)
    skewed = np.array([[10, 0]] * 4)
    for iteration in range(9):
        assert list(measure(effects, iteration, skewed)) == []
    told = {update.layer: update.step for update in effects.close()}
    assert told == {0: 4, 1: 4, 2: 4, 3: 7}
