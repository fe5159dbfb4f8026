import numpy as np
import pytest
from hypothesis import given

from jax_eplb.routing.local import local_share
from tests.replica_choice_cases import Batch, Ranks, batches, check_shares, compiled, shares
from tests.test_even import dealt_one_by_one, few

pytestmark = pytest.mark.light_compile


def nearest(batch: Batch, rank: int, expert: int) -> np.ndarray:
    slots = np.flatnonzero(batch.table == expert)
    place = slots // batch.ranks.slots_per_rank
    here = place == rank
    if batch.ranks.ranks_per_node is not None and not here.any():
        here = place // batch.ranks.ranks_per_node == rank // batch.ranks.ranks_per_node
    return slots[here] if here.any() else slots


@pytest.mark.slow
@given(batches)
def test_the_own_rank_comes_first_then_the_own_node_then_all(batch):
    batch = few(batch)
    expected = dealt_one_by_one(batch, lambda rank, expert: nearest(batch, rank, expert))
    found = shares(compiled(local_share, batch.ranks), batch)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@given(batches)
def test_no_token_is_lost_among_millions(batch):
    check_shares(shares(compiled(local_share, batch.ranks), batch), batch)


def test_without_nodes_a_rank_that_has_no_replica_deals_to_all():
    table = np.array([0, 1, 0, 1, 2, 2])
    batch = Batch(np.full((3, 3), 4), table, Ranks("expert", 3, 2))
    assert shares(compiled(local_share, batch.ranks), batch).tolist() == [
        [4, 4, 0, 0, 2, 2],
        [0, 0, 4, 4, 2, 2],
        [2, 2, 2, 2, 2, 2],
    ]
