"""The order of moves, played through on a table: nothing is overwritten before it was read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.moving import Moves, find_moves
from jax_eplb.moving.order import Hold, Release, Wave, in_any_order, in_waves
from tests.placement_cases import random_table, seeds, sizes


def play(old, moves, per_rank, at_once):
    """The table after all steps, and how many rows were held."""
    table, held, holds = old.copy(), None, 0
    for step in in_waves(moves, slots_per_rank=per_rank, slots_at_once=at_once):
        match step:
            case Wave(chosen):
                layer, source, destination = moves.take(np.array(chosen))
                for ranks in (source // per_rank, destination // per_rank):
                    assert np.bincount(ranks).max() <= at_once
                table[layer, destination] = table[layer, source]
            case Hold(move):
                assert held is None
                holds += 1
                held = move, table[moves.layer[move], moves.source[move]]
            case Release(move):
                assert held is not None
                assert held[0] == move
                table[moves.layer[move], moves.destination[move]] = held[1]
                held = None
    assert held is None
    return table, holds


@given(sizes, seeds, st.integers(1, 3))
def test_any_change_arrives_within_the_bound(size, seed, at_once):
    experts, slots, ranks = size
    generator = np.random.default_rng(seed)
    old, new = (random_table(generator, 3, experts, slots, ranks) for _ in range(2))
    moves = find_moves(old, new, num_ranks=ranks)
    np.testing.assert_array_equal(play(old, moves, slots // ranks, at_once)[0], new)


@given(seeds, st.integers(1, 4))
def test_permutations_of_slots_are_cycles_and_the_last_copies_survive(seed, at_once):
    generator = np.random.default_rng(seed)
    old, new = (np.array([generator.permutation(8) for _ in range(2)]) for _ in range(2))
    moves = find_moves(old, new, num_ranks=2)
    table, holds = play(old, moves, 4, at_once)
    np.testing.assert_array_equal(table, new)
    assert at_once < 4 or not holds  # all of a rank fits


def test_a_ring_of_ranks_goes_in_one_wave_of_one_row():
    old = np.arange(4)[None]
    moves = find_moves(old, np.roll(old, 1), num_ranks=4)
    steps = list(in_waves(moves, slots_per_rank=1, slots_at_once=1))
    assert len(steps) == 1
    assert isinstance(steps[0], Wave)


def test_a_swap_within_a_rank_is_opened_by_holding_a_row():
    old, new = np.array([[0, 1]]), np.array([[1, 0]])
    moves = find_moves(old, new, num_ranks=1)
    table, holds = play(old, moves, 2, 1)
    assert table.tolist() == new.tolist()
    assert holds == 1


def test_many_moves_take_hardly_more_waves_than_the_fullest_rank_needs():
    generator = np.random.default_rng(0)
    old, new = (random_table(generator, 6, 32, 48, 8) for _ in range(2))
    moves = find_moves(old, new, num_ranks=8)
    fullest = max(np.bincount(x // 6).max() for x in (moves.source, moves.destination))
    steps = list(in_waves(moves, slots_per_rank=6, slots_at_once=4))
    assert len(steps) <= -(-fullest // 4) + 4


def test_rows_from_the_host_have_no_sender():
    moves = Moves(np.zeros(4, int), ~np.arange(4), np.arange(4))
    steps = list(in_waves(moves, slots_per_rank=4, slots_at_once=2))
    assert [len(step.moves) for step in steps if isinstance(step, Wave)] == [2, 2]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_without_overwriting_every_move_is_in_one_wave(most):
    generator = np.random.default_rng(most)
    sender, receiver = generator.integers(0, 4, (2, 40))
    waves = in_any_order(sender, receiver, most)
    assert sorted(move for wave in waves for move in wave) == list(range(40))
    for wave in waves:
        assert max(np.bincount(sender[wave]).max(), np.bincount(receiver[wave]).max()) <= most
