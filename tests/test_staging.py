"""Staging and the flip: rows arrive, old arrays serve until then, and nothing compiles."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.moving import (
    Moves,
    RebalanceError,
    apply_moves,
    find_banks,
    find_moves,
    is_ready,
    prepare_moves,
    stage_moves,
    staging,
)
from jax_eplb.moving.exchange import exchange_rows
from jax_eplb.moving.rows import read_rows, write_program
from jax_eplb.online.parts import in_parts
from tests.moving_cases import assert_holds, layer_trees, put, stacked_tree, tables
from tests.tiny_model import counted_compilations

pytestmark = pytest.mark.light_compile

L, E, S, RANKS = 2, 8, 12, 4


def drawn(count, seed=0):
    source = tables(seed, L, E, S, RANKS)
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize("collective", [False, True])
def test_old_arrays_serve_until_the_flip(collective):
    old, new = drawn(2)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    staged = stage_moves(tree, find_moves(old, new, num_ranks=RANKS), collective=collective)
    assert_holds(tree, old, E)
    jax.block_until_ready(staged.arrays())
    assert is_ready(staged)
    moved = apply_moves(tree, staged)
    assert_holds(moved, new, E)
    assert moved["router"] is tree["router"]
    assert moved["moments"]["count"] is tree["moments"]["count"]
    assert tree["experts"]["down"].is_deleted()  # used up, not copied


def test_both_ways_bring_the_same_rows():
    old, new = drawn(2, seed=1)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    moves = find_moves(old, new, num_ranks=RANKS)
    ways = [stage_moves(tree, moves, collective=way) for way in (False, True)]
    (copied,), (sent,) = (staged.parts for staged in ways)
    np.testing.assert_array_equal(copied.table, sent.table)
    written = copied.table[..., 1] < S // RANKS
    for m, (rows, others) in enumerate(zip(copied.rows, sent.rows, strict=True)):
        for x, y in zip(rows, others, strict=True):
            np.testing.assert_array_equal(
                np.asarray(x)[written[:, m]], np.asarray(y)[written[:, m]]
            )


def fullest(moves):
    """The most rows that one rank sends or gets."""
    return max(np.bincount(x // (S // RANKS)).max() for x in (moves.source, moves.destination))


@pytest.mark.slow
@pytest.mark.parametrize("collective", [False, True])
def test_nothing_compiles_after_preparation(collective):
    old, *others = drawn(9)
    trees = [stacked_tree(old, E, expert_mesh(RANKS)) for _ in others]
    banks = find_banks(trees[0])
    prepare_moves(trees[0], 4, banks=banks, collective=collective)
    sizes = []
    with counted_compilations() as compiled:
        for tree, new, most in zip(trees, others, (1, 2, 3, 4) * 2, strict=True):
            moves = find_moves(old, new, num_ranks=RANKS)
            counts = [
                n for n in range(1, moves.layer.size) if fullest(moves.take(slice(n))) <= most
            ]
            moves = moves.take(slice(counts[-1]))
            staged = stage_moves(tree, moves, banks=banks, collective=collective)
            sizes.append(staged.parts[0].table.shape[1])
            moved, table = apply_moves(tree, staged), old.copy()
            table[moves.layer, moves.destination] = new[moves.layer, moves.destination]
            assert_holds(moved, table, E)
    assert compiled == []
    assert sizes == [1, 2, 4, 4] * 2


def test_the_flip_needs_no_communication_and_no_bank_beside_the_banks():
    bank = {"a": put(np.zeros((L, S, 32, 32), np.float32), expert_mesh(RANKS), None, "expert")}
    banks = find_banks(bank)
    (group,) = banks.groups
    arrays, table = banks.leaves(bank), np.zeros((RANKS, 4, 2), np.int32)
    rows = read_rows(arrays, table, spread=group.spread)
    row = 32 * 32 * 4
    for program, most, sends in (
        (read_rows.lower(arrays, table, spread=group.spread), row, False),
        # The rows side by side; a GPU scatters them as they are.
        (write_program.lower(arrays, rows, table, spread=group.spread), 4 * row + 512, False),
        (
            exchange_rows.lower(rows, table, spread=group.spread, specs=(P("expert"),)),
            3 * 4 * row + 4096,  # beside the rows given and those made
            True,
        ),
    ):
        compiled = program.compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= most
        assert ("all-to-all" in compiled.as_text()) == sends
        assert "all-gather" not in compiled.as_text()
    assert write_program.lower(arrays, rows, table, spread=group.spread).args_info[0][0][0].donated


def test_preparation_itself_moves_nothing():
    (old,) = drawn(1)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    prepare_moves(tree, 2)
    assert_holds(tree, old, E)


def test_only_rows_that_change_are_copied_between_devices(monkeypatch):
    (old,) = drawn(1)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    moves = Moves(np.array([0, 1]), np.array([0, S - 1]), np.array([S - 1, 4]))
    copies = []
    put_it = jax.device_put

    def counted(x, device=None, **options):
        if isinstance(x, jax.Array):
            copies.append(x.nbytes)
        return put_it(x, device, **options)

    monkeypatch.setattr(jax, "device_put", counted)
    stage_moves(tree, moves)
    row = sum(x.nbytes // (L * S) for x in [*tree["experts"].values(), tree["moments"]["mu"]])
    assert sum(copies) == 2 * row
    copies.clear()
    stage_moves(tree, Moves(np.array([0]), np.array([0]), np.array([1])))
    assert copies == []  # within the rank


def test_layers_apart_are_moved_each_in_its_own_arrays():
    old, new = drawn(2)
    new[0] = old[0]
    trees = layer_trees(old, E, expert_mesh(RANKS))
    staged = stage_moves(trees, find_moves(old, new, num_ranks=RANKS))
    assert len(staged.parts) == 1
    moved = apply_moves(trees, staged)
    assert_holds(moved, new, E)
    assert moved[0]["down"] is trees[0]["down"]


@pytest.mark.slow
def test_other_axes_of_the_mesh_keep_their_parts():
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    old, new = next(tables(0, L, 4, 6, 2)), next(tables(1, L, 4, 6, 2))
    values = np.arange(L * 4 * 4 * 2, dtype=np.float32).reshape(L, 4, 4, 2)
    layer = np.arange(L)[:, None]

    def tree(table):
        whole = values[layer, table]
        return [
            put(whole, mesh, None, "expert", "tensor"),
            put(whole, mesh, None, "expert", None, "tensor"),
            put(whole[..., 0, 0], mesh, None, ("expert",)),
        ]

    for collective in (False, True):
        before = tree(old)
        shardings = [x.sharding for x in before]
        moves = find_moves(old, new, num_ranks=2)
        moved = apply_moves(before, stage_moves(before, moves, collective=collective))
        for x, y, sharding in zip(moved, tree(new), shardings, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
            for shard in x.addressable_shards:  # every replica
                np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])


def staged_in_parts(trees, old, new, most=2):
    """Of two layers, each in its own arrays, and of many moves: many programs write them."""
    moves = find_moves(old, new, num_ranks=RANKS)
    parts = in_parts(moves, S // RANKS, most)
    banks = find_banks(trees)
    return [stage_moves(trees, part, banks=banks) for part in parts]


def fail_at(monkeypatch, writes):
    """Let those writes fail whose turn is in `writes`, before they have used anything up."""
    turn = iter(range(100))
    write = staging.write_rows

    def failing(*args, **options):
        if next(turn) in writes:
            raise MemoryError("no room")
        return write(*args, **options)

    monkeypatch.setattr(staging, "write_rows", failing)


def test_many_parts_are_written_as_one(monkeypatch):
    old, new = drawn(2)
    trees = layer_trees(old, E, expert_mesh(RANKS))
    staged = staged_in_parts(trees, old, new, most=1)
    assert len(staged) > 2
    assert_holds(apply_moves(trees, *staged), new, E)
    assert apply_moves(trees) is trees


@pytest.mark.parametrize("which", range(4))
def test_a_flip_that_fails_half_way_leaves_the_tree_as_it_was(monkeypatch, which):
    old, new = drawn(2)
    trees = layer_trees(old, E, expert_mesh(RANKS))
    staged = staged_in_parts(trees, old, new)
    assert sum(len(one.parts) for one in staged) >= 4
    fail_at(monkeypatch, {which})
    with pytest.raises(RebalanceError, match=r"failed: MemoryError: no room.*as it was") as caught:
        apply_moves(trees, *staged)
    assert_holds(caught.value.params, old, E)
    # The rows are still there: it can be tried again.
    assert_holds(apply_moves(caught.value.params, *staged), new, E)


def test_a_flip_that_cannot_be_undone_says_that_weights_are_lost(monkeypatch):
    old, new = drawn(2)
    trees = layer_trees(old, E, expert_mesh(RANKS))
    staged = staged_in_parts(trees, old, new)
    fail_at(monkeypatch, {2, 3})
    with pytest.raises(RebalanceError, match=r"Putting back .* failed too.*are lost") as caught:
        apply_moves(trees, *staged)
    assert caught.value.params is None


def test_nothing_compiles_where_many_parts_are_written_or_put_back(monkeypatch):
    old, new = drawn(2)
    trees = layer_trees(old, E, expert_mesh(RANKS))
    prepare_moves(trees, 2, banks=find_banks(trees))
    with counted_compilations() as compiled:
        staged = staged_in_parts(trees, old, new)
        fail_at(monkeypatch, {3})
        with pytest.raises(RebalanceError) as caught:
            apply_moves(trees, *staged)
        apply_moves(caught.value.params, *staged)
    assert compiled == []


def test_a_move_without_holder_needs_a_host_copy():
    (old,) = drawn(1)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    moves = Moves(np.array([1]), np.array([~5]), np.array([0]))
    with pytest.raises(ValueError, match="layer 1: no device holds expert 5; give a host copy"):
        stage_moves(tree, moves)
