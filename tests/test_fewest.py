import jax
import numpy as np
import pytest
from hypothesis import given

from jax_eplb.placement import Placement
from jax_eplb.planner import plan
from jax_eplb.routing.even import even_share
from jax_eplb.routing.fewest import WORTH_READING, fewest_shares
from tests.replica_choice_cases import Batch, Ranks, batches, check_shares, compiled, shares

pytestmark = pytest.mark.light_compile

fewest = jax.jit(fewest_shares)


@pytest.mark.slow
@given(batches)
def test_each_expert_gets_the_replicas_that_its_tokens_are_worth(batch):
    found = np.asarray(fewest(batch.counts, batch.tables), np.int64)
    check_shares(found, batch)
    for expert, tokens in enumerate(batch.counts.sum(axis=0)):
        slots = np.flatnonzero(batch.table == expert)
        worth = min(max(1, tokens // WORTH_READING), len(slots))
        assert np.count_nonzero(found[:, slots].sum(axis=0)) <= worth
        if tokens >= 8 * len(batch.counts) * worth:  # enough for each rank's to reach all
            assert np.count_nonzero(found[:, slots].sum(axis=0)) == worth


def test_with_many_tokens_it_is_even():
    table = np.array([0, 1, 2, 0, 1, 3])
    counts = np.full((2, 4), 2 * WORTH_READING + 1)
    batch = Batch(counts, table, Ranks("expert", 2, 3))
    np.testing.assert_array_equal(fewest(counts, batch.tables), shares(compiled(even_share), batch))


def test_few_tokens_read_as_many_experts_on_every_rank():
    counts = np.random.default_rng(3).lognormal(0, 1, (4, 2, 64))
    placement: Placement = plan(counts, 80, 8, split="balanced", effort="fast").placement
    few = np.full((8, 64), 4)
    for layer in range(placement.num_layers):
        found = np.asarray(fewest(few, placement.tables().of_layer(layer)))
        read = (found.sum(axis=0) > 0).reshape(8, -1).sum(axis=1)
        assert read.sum() == 64  # each expert once
        assert read.max() <= 9
