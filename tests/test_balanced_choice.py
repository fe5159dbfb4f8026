import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P
from scipy.optimize import linprog

from jax_eplb.mesh import expert_mesh
from jax_eplb.routing import Ranks
from jax_eplb.routing.balanced import balanced, balanced_shares, plain_shares
from jax_eplb.routing.balanced_kernel import kernel_shares
from tests.gpu_programs import lowered_for_gpu
from tests.placement_cases import random_table
from tests.replica_choice_cases import (
    SHAPES,
    Batch,
    batches,
    check_shares,
    compiled,
    draw_batch,
)

pytestmark = pytest.mark.light_compile


def divided(batch: Batch) -> np.ndarray:
    """int64[P, S]."""
    return np.asarray(compiled(plain_shares, batch.ranks)(batch.counts, batch.tables), np.int64)


def rank_loads(share: np.ndarray, batch: Batch) -> np.ndarray:
    """float64[P]: tokens, and what a slower rank counts as having beside them."""
    loads = share.sum(axis=0).reshape(batch.ranks.num_ranks, -1).sum(axis=1)
    return loads + handicap_of(batch)


def handicap_of(batch: Batch) -> np.ndarray:
    if batch.capacity is None:
        return np.zeros(batch.ranks.num_ranks)
    missing = (batch.capacity.max() - batch.capacity) / batch.capacity.sum()
    return missing * batch.counts.sum(dtype=np.float64)


def least_largest_load(batch: Batch) -> float:
    """Of all divisions, fractions allowed: a linear programme."""
    num_ranks, num_slots = batch.ranks.num_ranks, batch.table.size
    by_expert = batch.table == np.arange(batch.counts.shape[1])[:, None]
    by_rank = np.kron(np.eye(num_ranks), np.ones(num_slots // num_ranks))
    total = batch.counts.sum(axis=0, dtype=np.float64)
    unit = max(total.sum() / num_ranks, 1)
    result = linprog(
        np.append(np.zeros(num_slots), 1),
        A_ub=np.column_stack([by_rank, np.full(num_ranks, -1)]),
        b_ub=-handicap_of(batch) / unit,
        A_eq=np.column_stack([by_expert, np.zeros(len(by_expert))]),
        b_eq=total / unit,
    )
    assert result.success
    return result.fun * unit


@pytest.mark.slow
@given(batches)
def test_no_token_is_lost_and_the_fullest_rank_is_a_linear_programmes(batch):
    found = divided(batch)
    check_shares(found, batch)
    loads = rank_loads(found, batch)
    least = least_largest_load(batch)
    assert least - 1e-6 * loads.mean() <= loads.max() <= least + 1 + 1e-3 * loads.mean()


@pytest.mark.slow
@given(batches)
def test_where_it_saves_tokens_stay_where_they_are_as_far_as_the_quotas_go(batch):
    batch = batch._replace(ranks=batch.ranks._replace(prefers_near=True))
    found, per_rank = divided(batch), batch.ranks.slots_per_rank
    quota = found.sum(axis=0)
    for rank, expert in itertools.product(*map(range, batch.counts.shape)):
        held = np.flatnonzero(batch.table == expert)
        here = held[held // per_rank == rank]
        own = min(batch.counts[rank, expert], quota[here].sum())
        assert found[rank, here].sum() == own
        per_node = batch.ranks.ranks_per_node
        if per_node is None or rank % per_node:
            continue
        ranks = np.arange(rank, rank + per_node)
        near = held[held // per_rank // per_node == rank // per_node]
        tokens = batch.counts[ranks, expert].sum(dtype=np.int64)
        assert found[np.ix_(ranks, near)].sum() == min(tokens, quota[near].sum())


@pytest.mark.slow
@given(batches)
def test_whose_tokens_fill_a_quota_does_not_change_it(batch):
    near = batch._replace(ranks=batch.ranks._replace(prefers_near=True))
    quota, quota_near = divided(batch).sum(axis=0), divided(near).sum(axis=0)
    np.testing.assert_array_equal(quota, quota_near)


def pairs_of(share: np.ndarray) -> np.ndarray:
    """int64[P, P]: what each rank sends each rank."""
    num_ranks = len(share)
    return share.reshape(num_ranks, num_ranks, -1).sum(axis=2)


def domains(seed: int, ranks: int = 4, experts: int = 12, more: int = 2) -> Batch:
    """Each rank has favourites of its own among the experts; a random table with replicas."""
    generator = np.random.default_rng(seed)
    table = random_table(generator, 1, experts, experts + more * ranks, ranks)[0]
    odds = generator.dirichlet(np.full(experts, 3.0), ranks)
    counts = generator.multinomial(20000, odds).astype(np.int32)
    return Batch(counts, table.astype(np.int64), Ranks("expert", ranks, table.size // ranks))


def least_fullest_pair(batch: Batch, quota: np.ndarray) -> float:
    """Of all ways to fill the quotas, fractions allowed: a linear programme."""
    (num_ranks, num_experts), num_slots = batch.counts.shape, batch.table.size
    slots, ranks = np.eye(num_slots), np.eye(num_ranks)
    by_rank = np.kron(ranks, np.ones(num_slots // num_ranks))
    by_expert = (batch.table == np.arange(num_experts)[:, None]).astype(float)
    pairs = np.kron(ranks, by_rank)
    equal = np.concatenate([np.kron(ranks, by_expert), np.kron(np.ones(num_ranks), slots)])
    result = linprog(
        np.append(np.zeros(num_ranks * num_slots), 1),
        A_ub=np.column_stack([pairs, np.full(len(pairs), -1)]),
        b_ub=np.zeros(len(pairs)),
        A_eq=np.column_stack([equal, np.zeros(len(equal))]),
        b_eq=np.concatenate([batch.counts.reshape(-1), quota]),
    )
    assert result.success
    return result.fun


@pytest.mark.slow
def test_the_fullest_pair_of_ranks_is_nearly_a_linear_programmes():
    proportional = found = 0.0
    for seed in range(20):
        batch = domains(seed)
        share = divided(batch)
        quota = share.sum(axis=0)
        least = least_fullest_pair(batch, quota)
        fullest = pairs_of(share).max()
        assert least - 1e-6 * least <= fullest <= 1.25 * least
        tokens = np.maximum([quota[batch.table == expert].sum() for expert in batch.table], 1)
        alike = pairs_of(batch.counts[:, batch.table] * quota / tokens).max()
        proportional, found = proportional + alike / least, found + fullest / least
    assert found < 20 * 1.06 < 20 * 1.12 < proportional


@pytest.mark.slow
def test_pairs_of_ranks_exchange_alike_where_domains_differ():
    """Two replicas of each expert; each rank's tokens are of other experts."""
    ranks = 8
    table = np.stack([np.arange(ranks), np.roll(np.arange(ranks), -1)], axis=1).reshape(-1)
    generator = np.random.default_rng(0)
    counts = generator.multinomial(8000, generator.dirichlet(np.full(ranks, 8.0), ranks))
    batch = Batch(counts.astype(np.int32), table, Ranks("expert", ranks, 2))
    near = batch._replace(ranks=batch.ranks._replace(prefers_near=True))
    alike, stays = pairs_of(divided(batch)), pairs_of(divided(near))
    np.testing.assert_array_equal(alike.sum(axis=0), stays.sum(axis=0))  # the same quotas
    assert alike.max() < 0.7 * stays.max()
    assert np.trace(stays) > 1.5 * np.trace(alike)


@pytest.mark.slow
def test_small_batches_are_as_level_as_any_division_in_whole_tokens():
    worse = 0
    for seed in range(30):
        generator = np.random.default_rng(seed)
        table = np.array([0, 1, 2, 0, 1, 3, 2, 4, 0])
        counts = generator.integers(0, 5, (3, 5)).astype(np.int32)
        batch = Batch(counts, table, Ranks("expert", 3, 3))
        worse += rank_loads(divided(batch), batch).max() - least_by_trial(batch)
    assert worse <= 1


def least_by_trial(batch: Batch) -> int:
    """The largest rank load of the best division, among all of them."""
    loads = {(0, 0, 0)}
    for expert, tokens in enumerate(batch.counts.sum(axis=0)):
        ranks = np.flatnonzero(batch.table == expert) // batch.ranks.slots_per_rank
        parts = [p for p in itertools.product(range(tokens + 1), repeat=len(ranks) - 1)]
        parts = [(*p, tokens - sum(p)) for p in parts if sum(p) <= tokens]
        added = {tuple(np.bincount(ranks, weights=part, minlength=3)) for part in parts}
        loads = {tuple(np.add(old, new)) for old in loads for new in added}
    return int(min(map(max, loads)))


@pytest.mark.slow
def test_a_large_batch_is_divided_exactly():
    """Past 2^24 floats no longer count in ones."""
    table = np.array([0, 1, 2, 3, 0, 1, 3, 2])
    counts = np.array([[2**26 + 1, 3, 2**25 + 7, 1], [2**27 + 5, 2**24 + 1, 0, 2**28 + 3]])
    batch = Batch(counts.astype(np.int32), table, Ranks("expert", 2, 4))
    found = divided(batch)
    check_shares(found, batch)
    assert rank_loads(found, batch).max() <= least_largest_load(batch) * (1 + 1e-5)


@pytest.mark.slow
def test_ranks_get_tokens_in_proportion_to_their_speeds_as_far_as_replicas_allow():
    table = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    batch = Batch(np.full((3, 3), 500, np.int32), table, Ranks("expert", 3, 3))
    for speeds in ([1, 1, 1], [1, 0.5, 1], [4, 2, 3]):
        found = divided(batch._replace(capacity=np.array(speeds)))
        expected = 4500 * np.array(speeds) / np.sum(speeds)
        np.testing.assert_allclose(rank_loads(found, batch), expected, atol=3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]])  # without nodes, and with them
def test_the_kernel_and_plain_jax_agree_to_the_token(shape):
    for seed in range(6):
        batch = draw_batch(shape, seed)
        if seed % 2:
            batch = batch._replace(capacity=np.linspace(0.3, 1.0, batch.ranks.num_ranks))
        batch = batch._replace(ranks=batch.ranks._replace(prefers_near=seed % 3 == 0))
        kernel = interpreted(batch.ranks)
        np.testing.assert_array_equal(kernel(batch.counts, batch.tables), divided(batch))


@functools.cache
def interpreted(ranks: Ranks):
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(functools.partial(kernel_shares, ranks=ranks, interpret=on_cpu))


def in_shard_map(batch: Batch):
    def own(counts, tables):
        found = balanced(counts[0], tables, batch.ranks)
        return found.own[None], found.of_all[None]

    specs = {"in_specs": (P("expert"), P()), "out_specs": P("expert")}
    return jax.jit(jax.shard_map(own, mesh=expert_mesh(batch.ranks.num_ranks), **specs))


@pytest.mark.slow
def test_in_a_shard_map_each_rank_reads_off_its_own_share():
    batch = draw_batch((7, 12, 6, 3), 1)
    own, of_all = in_shard_map(batch)(batch.counts, batch.tables)
    np.testing.assert_array_equal(own, divided(batch))
    for told in np.asarray(of_all):
        np.testing.assert_array_equal(told, own)


@pytest.mark.slow
# JAX 0.12 says that it will drop this backend one day; until then it is what lowers these kernels.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_on_a_gpu_it_is_one_kernel():
    batch = draw_batch((7, 12, 6, 3), 1)
    run = jax.jit(functools.partial(balanced_shares, ranks=batch.ranks))
    text = lowered_for_gpu(run, jnp.asarray(batch.counts), batch.tables)
    assert text.count("xla.gpu.triton") == 1
    assert "stablehlo.while" not in text
