import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.balanced import refine_balanced
from jax_eplb.planner.changes import Limits
from jax_eplb.planner.pack import pack
from jax_eplb.planner.replicate import replicate
from jax_eplb.planner.scenarios import draw_scenarios
from jax_eplb.split import balanced_split, sum_by_rank

pytestmark = pytest.mark.light_compile

E, S, P, L = 32, 48, 8, 3


def scenarios_of(seed, shape=(8, L, E), spread=0.5):
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0, 1.2, shape[1:])
    load = jnp.asarray(mean * rng.lognormal(0, spread, shape), jnp.float32)
    return draw_scenarios(load, num_scenarios=16)


def start_of(scenarios, num_slots=S, num_ranks=P, capacity=None):
    mean = scenarios.mean(axis=0)
    live = None
    if capacity is not None:
        ranks = jnp.int32((np.asarray(capacity) > 0).sum())
        live = ranks * (num_slots // num_ranks), ranks
    count = replicate(mean, num_slots, num_ranks, -0.5, live=live)
    return pack(mean, count, num_slots=num_slots, num_ranks=num_ranks, capacity=capacity)


def searched(start, scenarios, rounds=20, most=None, capacity=(1.0,) * P):
    """With every limit given, so that the tests of one shape share a compilation."""
    if most is None:
        most = jnp.full(len(start), start.shape[1], jnp.int32)
    limits = Limits(jnp.asarray(capacity, jnp.float32), start, most)
    return refine_balanced(
        start, scenarios, num_ranks=len(capacity), max_rounds=rounds, limits=limits
    )


def objective(slots, scenarios, num_ranks=P, capacity=None):
    """Mean over scenarios of the fullest rank, in tokens of the mean rank."""
    tokens = balanced_split(
        scenarios, slots, scenarios.shape[2], num_ranks, capacity=capacity, num_steps=200
    )
    by_rank = np.asarray(sum_by_rank(tokens, num_ranks), np.float64)
    speed = np.ones(num_ranks) if capacity is None else np.asarray(capacity, np.float64)
    height = by_rank / np.where(speed > 0, speed, np.inf) * speed.sum()
    return height.max(axis=-1).mean(axis=0)


def assert_valid(slots, num_experts=E, num_ranks=P, capacity=None):
    for row in np.asarray(slots):
        assert set(row[row < num_experts].tolist()) == set(range(num_experts))
        for rank, held in enumerate(row.reshape(num_ranks, -1)):
            if capacity is not None and capacity[rank] == 0:
                assert (held == num_experts).all()
            else:
                assert (held < num_experts).all()
                assert len(set(held.tolist())) == len(held)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_search_lowers_its_objective_and_leaves_valid_tables(seed):
    scenarios = scenarios_of(seed)
    start = start_of(scenarios)
    slots = searched(start, scenarios)
    assert_valid(slots)
    before, after = objective(start, scenarios), objective(slots, scenarios)
    assert (after < before + 2e-3).all()
    assert after.mean() - 1 < 0.7 * (before.mean() - 1)


@pytest.mark.slow
def test_the_search_is_deterministic():
    scenarios = scenarios_of(0)
    first, second = (searched(start_of(scenarios), scenarios) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_no_round_changes_nothing():
    scenarios = scenarios_of(1)
    slots = searched(start_of(scenarios), scenarios, rounds=0)
    np.testing.assert_array_equal(slots, start_of(scenarios))


@pytest.mark.slow
def test_no_more_slots_change_than_allowed():
    scenarios = scenarios_of(2)
    start = start_of(scenarios)
    most = jnp.array([0, 3, 6], jnp.int32)
    slots = searched(start, scenarios, most=most)
    assert_valid(slots)
    moves = (np.asarray(slots) != np.asarray(start)).sum(axis=1)
    assert (moves <= np.asarray(most)).all()
    assert moves[2] > 0


@pytest.mark.slow
def test_ranks_of_capacity_zero_stay_empty_and_slow_ones_get_less():
    scenarios = scenarios_of(3)
    capacity = jnp.array([1, 0, 2, 1, 1, 0.5, 1, 1], jnp.float32)
    start = start_of(scenarios, capacity=capacity)
    slots = searched(start, scenarios, capacity=capacity)
    assert_valid(slots, capacity=capacity)
    before, after = (objective(table, scenarios, capacity=capacity) for table in (start, slots))
    assert (after < before + 2e-3).all()
    assert after.mean() < before.mean()


def every_placement(num_experts, num_slots, num_ranks):
    """All sets of experts that the ranks may hold, each table once."""
    held = list(itertools.combinations(range(num_experts), num_slots // num_ranks))
    for ranks in itertools.combinations_with_replacement(held, num_ranks):
        if len(set(itertools.chain(*ranks))) == num_experts:
            yield sum(ranks, ())


@pytest.mark.slow
def test_tiny_problems_are_mostly_solved():
    tables = np.array(list(every_placement(4, 6, 3)), np.int32)
    scenarios = scenarios_of(4, (4, 20, 4))
    slots = refine_balanced(start_of(scenarios, 6, 3), scenarios, num_ranks=3, max_rounds=20)
    found = objective(slots, scenarios, 3)
    best = np.full(20, np.inf)
    spread = jnp.moveaxis(scenarios, 1, 0)  # [20, W, E]
    for problem in range(20):
        repeated = jnp.broadcast_to(spread[problem][:, None], (spread.shape[1], len(tables), 4))
        best[problem] = objective(jnp.asarray(tables), repeated, 3).min()
    assert (found >= best - 1e-4).all()
    assert (found < best * 1.005).sum() >= 14
    assert (found / best).mean() < 1.02


@pytest.mark.slow
def test_more_rounds_or_moves_do_not_recompile():
    scenarios = scenarios_of(0)
    start = start_of(scenarios)

    def plan(rounds, moves):
        return searched(start, scenarios, rounds, jnp.full(L, moves, jnp.int32))

    plan(1, 4)
    compiled = refine_balanced._cache_size()
    jax.block_until_ready([plan(2, 5), plan(3, 6)])
    assert refine_balanced._cache_size() == compiled
