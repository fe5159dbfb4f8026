import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.kernels.mosaic_tiles import Tiles, Walk
from jax_eplb.kernels.tile_table import ALIGN

pytestmark = pytest.mark.light_compile

MOST, GROUPS, COLUMNS, AT_ONCE = 1200, 4, 3, 5


@functools.partial(jax.jit, static_argnames="walk")
def walked(walk, sizes):
    """The tiles that each of `AT_ONCE` blocks, or pairs of blocks, meets on its way: [U, T, 2]."""
    half = jnp.arange(2 if walk.tiles.pair else 1)

    def way_of(unit):
        def step(place, _):
            tile = jax.vmap(lambda half: walk.tile(place, half))(half)
            return walk.go_on(sizes, place, jnp.int32(AT_ONCE)), (tile, walk.goes_on(place))

        return jax.lax.scan(step, walk.begin(sizes, unit), length=40)[1]

    return jax.vmap(way_of)(jnp.arange(AT_ONCE))


def units_of(walk, sizes):
    """All units in their order, each the tiles of one block or two."""
    found, exists = jax.tree.map(np.asarray, walked(walk, jnp.array(sizes, jnp.int32)))
    assert not exists[:, -1].any()
    halves = range(found.start.shape[2])
    return [
        [jax.tree.map(lambda x, at=(way, turn, half): int(x[at]), found) for half in halves]
        for turn in range(exists.shape[1])
        for way in range(AT_ONCE)
        if exists[way, turn]
    ]


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(0, MOST // GROUPS), min_size=GROUPS, max_size=GROUPS),
    tiles=st.sampled_from([Tiles(64), Tiles(128), Tiles(64, window=2), Tiles(128, pair=True)]),
)
def test_the_tiles_hold_every_row_and_column_once_and_no_row_of_another_group(sizes, tiles):
    group_of_row = np.repeat(np.arange(GROUPS + 1), [*sizes, MOST - sum(sizes)])
    seen = np.zeros((MOST, COLUMNS + 1), int)
    for unit in units_of(Walk(tiles, MOST, GROUPS, COLUMNS), sizes):
        for group, start, begin, end, column, _ in unit:
            assert start % ALIGN == 0
            assert 0 <= begin < end <= tiles.block_m
            rows = np.arange(start + begin, start + end)
            assert (group_of_row[rows] == group).all()
            seen[rows, column] += 1
    assert (seen[:, :COLUMNS] == 1).all()


@pytest.mark.parametrize("rows", [100, 256, 300])
def test_a_pair_has_the_weights_in_common_or_else_the_rows(rows):
    for first, second in units_of(Walk(Tiles(128, pair=True), rows, 1, 4), [rows]):
        assert first.shares_weights == second.shares_weights
        if first.shares_weights:
            assert (first.group, first.column) == (second.group, second.column)
            assert second.start == first.start + 128
        else:
            assert (first.group, first.start) == (second.group, second.start)
            assert second.column == first.column + 1


def test_a_group_is_cut_into_windows_of_about_equal_size_that_go_through_all_columns():
    units = units_of(Walk(Tiles(64, window=4), 640, 1, 2), [640])
    order = [(tile.start // 64, tile.column) for (tile,) in units]
    windows = [(0, 1, 2), (3, 4, 5), (6, 7, 8, 9)]
    assert order == [(row, column) for rows in windows for column in (0, 1) for row in rows]
