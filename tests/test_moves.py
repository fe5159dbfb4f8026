"""Moves against brute force: the right slots, the nearest holders, senders as even as can be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.moving import Moves, find_moves
from tests.placement_cases import random_table, seeds, sizes


def distance(rank, other, per_node):
    if rank == other:
        return 0
    return 1 if per_node is None or rank // per_node == other // per_node else 2


def follow(old, moves):
    """The table after the moves."""
    new = old.copy()
    new[moves.layer, moves.destination] = np.where(
        moves.source < 0, ~moves.source, old[moves.layer, moves.source]
    )
    return new


@given(sizes, seeds, st.booleans())
def test_moves_fill_exactly_the_slots_that_change_from_the_nearest_rank(size, seed, in_nodes):
    experts, slots, ranks = size
    generator = np.random.default_rng(seed)
    old, new = (random_table(generator, 3, experts, slots, ranks) for _ in range(2))
    per_node = ranks // 2 if in_nodes and ranks % 2 == 0 else None
    moves = find_moves(old, new, num_ranks=ranks, ranks_per_node=per_node)
    np.testing.assert_array_equal(follow(old, moves), new)
    changed = {*zip(*np.nonzero(old != new), strict=True)}
    made = list(zip(moves.layer, moves.destination, strict=True))
    assert len(made) == len(set(made))
    assert set(made) == changed
    width = slots // ranks
    for layer, source, destination in zip(*moves, strict=True):
        holders = np.flatnonzero(old[layer] == new[layer, destination]) // width
        reach = [distance(int(h), destination // width, per_node) for h in holders]
        assert distance(source // width, destination // width, per_node) == min(reach)


@given(seeds)
def test_no_choice_of_nearest_senders_is_more_even(seed):
    generator = np.random.default_rng(seed)
    ranks, slots, experts = 4, 8, 3
    old, new = (random_table(generator, 1, experts, slots, ranks) for _ in range(2))
    moves = find_moves(old, new, num_ranks=ranks)
    choices = []
    for destination in moves.destination:
        holders = np.unique(np.flatnonzero(old[0] == new[0, destination]) // 2)
        if destination // 2 not in holders:  # else a copy within the rank
            choices.append(holders)
    sent = moves.source // 2 != moves.destination // 2
    load = np.bincount(moves.source[sent] // 2, minlength=ranks)
    every = [
        np.sort(np.bincount(np.array(chosen, int), minlength=ranks))
        for chosen in itertools.product(*choices)
    ]
    assert (np.sort(load) ** 2).sum() == min((one**2).sum() for one in every)
    assert load.max() == min(one.max() for one in every)


def test_a_chain_of_ranks_evens_out_what_taking_the_least_loaded_cannot():
    # Rank 0 alone has experts 1 and 2 and shares 0 with rank 1, which shares 3 with rank 2.
    old = np.array([[0, 1, 2, 4, 0, 3, 5, 5, 3, 6, 6, 6, 7, 7, 7, 7]])
    new = np.array([[0, 1, 2, 4, 0, 3, 5, 5, 3, 6, 6, 6, 1, 2, 0, 3]])
    moves = find_moves(old, new, num_ranks=4)
    assert np.bincount(moves.source // 4, minlength=4).tolist() == [2, 1, 1, 0]


def test_a_lost_rank_holds_nothing_and_is_filled_anew():
    old, new = np.array([[0, 1, 2, 0, 3, 1]]), np.array([[0, 1, 2, 3, 3, 1]])
    moves = find_moves(old, new, num_ranks=3, lost_ranks=[2])
    found = dict(zip(moves.destination.tolist(), moves.source.tolist(), strict=True))
    assert found == {3: ~3, 4: ~3, 5: 1}  # expert 3 was on no other rank, 1 was on rank 0


def test_empty_slots_are_neither_sources_nor_filled():
    old, new = np.array([[0, 1, 2, 2]]), np.array([[0, 2, 1, 0]])
    empty = 2  # with two experts
    moves = find_moves(old, new, num_ranks=2, num_experts=empty)
    assert moves.destination.tolist() == [2, 3]
    assert moves.source.tolist() == [1, 0]


def test_nothing_changed_is_no_move():
    table = np.arange(4)[None]
    assert find_moves(table, table, num_ranks=2).layer.size == 0


@pytest.mark.parametrize(
    ("old", "new", "ranks", "node", "message"),
    [
        ([[0, 1]], [[0, 1, 1]], 1, None, r"shapes \(1, 2\) and \(1, 3\)"),
        ([0, 1], [0, 1], 1, None, r"shapes \(2,\)"),
        ([[0, 1, 0]], [[0, 1, 1]], 2, None, "3 slots cannot be divided among 2 ranks"),
        ([[0, 1, 0, 1]], [[0, 1, 1, 1]], 4, 3, "4 ranks cannot be divided into nodes of 3"),
    ],
)
def test_tables_that_do_not_fit_are_refused(old, new, ranks, node, message):
    with pytest.raises(ValueError, match=message):
        find_moves(np.array(old), np.array(new), num_ranks=ranks, ranks_per_node=node)


def test_moves_can_be_picked():
    moves = Moves(np.array([0, 1]), np.array([2, 3]), np.array([4, 5]))
    assert [field.tolist() for field in moves.take(np.array([False, True]))] == [[1], [3], [5]]
