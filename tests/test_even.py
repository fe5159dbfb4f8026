import numpy as np
import pytest
from hypothesis import given

from jax_eplb.routing.even import even_share
from tests.replica_choice_cases import Batch, Ranks, batches, check_shares, compiled, shares

pytestmark = pytest.mark.light_compile


def dealt_one_by_one(batch: Batch, candidates) -> np.ndarray:
    """int64[P, S]: the j-th choice of an expert goes to candidate (j + rank) mod their number."""
    num_ranks, num_experts = batch.counts.shape
    share = np.zeros((num_ranks, batch.table.size), np.int64)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            slots = candidates(rank, expert)
            for j in range(batch.counts[rank, expert]):
                share[rank, slots[(j + rank) % len(slots)]] += 1
    return share


def few(batch: Batch) -> Batch:
    """With so few tokens that they can be dealt one by one."""
    return batch._replace(counts=batch.counts % 20)


@pytest.mark.slow
@given(batches)
def test_choices_are_dealt_in_turn_from_a_replica_that_the_rank_sets(batch):
    batch = few(batch)
    turn = np.asarray(batch.tables.replica_index)

    def slots_in_turn(_, expert):
        slots = np.flatnonzero(batch.table == expert)
        return slots[turn[slots].argsort()]

    expected = dealt_one_by_one(batch, slots_in_turn)
    np.testing.assert_array_equal(shares(compiled(even_share), batch), expected)


@pytest.mark.slow
@given(batches)
def test_no_token_is_lost_among_millions(batch):
    check_shares(shares(compiled(even_share), batch), batch)


def test_the_remainders_of_the_ranks_do_not_meet_on_one_replica():
    batch = Batch(np.array([[3, 0], [3, 0]]), np.array([0, 1, 0, 1]), Ranks("expert", 2, 2))
    assert shares(compiled(even_share), batch).tolist() == [[2, 0, 1, 0], [1, 0, 2, 0]]
