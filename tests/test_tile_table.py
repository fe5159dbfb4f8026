import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.kernels.tile_table import ALIGN, tile_table

pytestmark = pytest.mark.light_compile

MOST = 600


@given(
    sizes=st.lists(st.integers(0, 150), min_size=4, max_size=4),
    block_m=st.sampled_from([64, 128]),
)
def test_the_tiles_hold_every_row_once_and_no_row_of_another_group(sizes, block_m):
    table = jax.jit(tile_table, static_argnums=(0, 2))(MOST, np.array(sizes, np.int32), block_m)
    group_of_row = np.repeat(np.arange(5), [*sizes, MOST - sum(sizes)])
    seen = np.zeros(MOST, int)
    used = int(table.used[0])
    assert used <= len(table.group)
    for group, start, begin, end in np.array(table[:4]).T[:used]:
        assert start % ALIGN == 0
        assert 0 <= begin <= ALIGN or begin == end
        rows = np.arange(start + begin, start + end)
        assert (group_of_row[rows] == group).all()
        seen[rows] += 1
    assert (seen == 1).all()
    assert (np.array(table.end)[used:] == 0).all()
