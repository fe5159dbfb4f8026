"""Batches on random placements for the tests of replica choice, and the least possible largest load.

Axes: P ranks, E experts, S slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from scipy.optimize import linprog

from jax_eplb import Placement
from jax_eplb.routing.ranks import Ranks
from tests.placement_cases import random_table, seeds

# (E, S, P, ranks per node). Few, as each shape compiles anew. Among them: one rank, no replicas,
# two replicas of an expert on one rank, more slots than the experts need.
SHAPES = ((1, 4, 2, None), (6, 6, 3, 1), (9, 12, 2, None), (5, 16, 8, 4), (7, 12, 6, 3), (4, 6, 1, 1))


class Batch(NamedTuple):
    counts: np.ndarray  # int32[P, E]
    table: np.ndarray  # int64[S]
    ranks: Ranks

    @property
    def tables(self):
        placement = Placement.from_slots(
            self.table[None], num_experts=self.counts.shape[1], num_ranks=self.ranks.num_ranks
        )
        return jax.tree.map(lambda table: table[0], placement.tables())


def draw_batch(shape, seed: int) -> Batch:
    """Skewed counts of a few tokens to millions; often none on a rank, or of an expert."""
    experts, slots, ranks, per_node = shape
    generator = np.random.default_rng(seed)
    counts = generator.lognormal(generator.uniform(0, 12), 2, (1, experts))
    counts = generator.poisson(np.minimum(counts * generator.lognormal(0, 1, (ranks, 1)), 2e6))
    counts[generator.random(ranks) < 0.2] = 0
    counts[:, generator.random(experts) < 0.2] = 0
    table = random_table(generator, 1, experts, slots, ranks)[0].astype(np.int64)
    return Batch(counts.astype(np.int32), table, Ranks("expert", ranks, slots // ranks, per_node))


batches = st.builds(draw_batch, st.sampled_from(SHAPES), seeds)


def shares(policy, batch: Batch, *, by_rank: bool = True) -> np.ndarray:
    """int64[P, S]: the share of each rank, of a jitted policy for one rank."""
    tables = batch.tables
    given = batch.counts if by_rank else [batch.counts] * len(batch.counts)
    every = [policy(jnp.asarray(c), tables, jnp.int32(r)) for r, c in enumerate(given)]
    return np.array(every, np.int64)


def check_shares(found: np.ndarray, batch: Batch) -> None:
    """Every token goes to a slot of its expert, and none is lost or made up."""
    assert (found >= 0).all()
    for rank, share in enumerate(found):
        by_expert = np.bincount(batch.table, weights=share, minlength=batch.counts.shape[1])
        np.testing.assert_array_equal(by_expert, batch.counts[rank])


def least_largest_load(tokens: np.ndarray, table: np.ndarray, num_ranks: int) -> float:
    """The largest rank load, fractions allowed, of the best division: a linear programme."""
    num_slots, num_experts = table.size, tokens.size
    by_expert = np.zeros((num_experts, num_slots + 1))
    by_expert[table, np.arange(num_slots)] = 1
    by_rank = np.kron(np.eye(num_ranks), np.ones(num_slots // num_ranks))
    largest = np.zeros(num_slots + 1)
    largest[-1] = 1
    result = linprog(
        largest,
        A_ub=np.column_stack([by_rank, -np.ones(num_ranks)]),
        b_ub=np.zeros(num_ranks),
        A_eq=by_expert,
        b_eq=tokens,
    )
    assert result.success
    return result.fun


@functools.cache
def jitted(policy, *static):
    """One compiled function for each shape, whatever test asks for it."""
    return jax.jit(functools.partial(policy), static_argnums=static)
