"""Batches on random placements, for the tests of replica choice.

Axes: P ranks, E experts, S slots.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st

from jax_eplb.routing import Ranks
from jax_eplb.tables import PlacementTables, derive_tables
from tests.light_compile import light_compile
from tests.placement_cases import random_table, seeds

# (E, S, P, ranks per node). Few, as each shape compiles anew. Among them: one rank, no spare
# slots, one expert alone, two replicas of an expert on one rank.
SHAPES = (
    (1, 4, 2, None),
    (6, 6, 3, 1),
    (9, 12, 2, None),
    (5, 16, 8, 4),
    (7, 12, 6, 3),
    (4, 6, 1, 1),
)


class Batch(NamedTuple):
    counts: np.ndarray  # int32[P, E]
    table: np.ndarray  # int64[S]; E where a slot is empty
    ranks: Ranks
    capacity: np.ndarray | None = None  # float32[P]: speeds; None: all alike

    @property
    def tables(self) -> PlacementTables:
        """Those of the one layer."""
        capacity = np.ones(len(self.counts)) if self.capacity is None else self.capacity
        table, capacity = np.asarray(self.table[None], np.int32), np.asarray(capacity, np.float32)
        with light_compile():
            return _tables_of(table, capacity, self.counts.shape[1], self.ranks.num_ranks)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tables_of(table, capacity, num_experts: int, num_ranks: int) -> PlacementTables:
    return derive_tables(
        table,
        num_experts=num_experts,
        num_ranks=num_ranks,
        with_leveling=True,
        capacity=capacity,
    ).of_layer(0)


def draw_batch(shape, seed: int) -> Batch:
    """Skewed counts, of a few tokens or of millions; often none on a rank or for an expert."""
    experts, slots, ranks, per_node = shape
    generator = np.random.default_rng(seed)
    mean = generator.lognormal(generator.uniform(0, 12), 2, (1, experts))
    counts = generator.poisson(np.minimum(mean * generator.lognormal(0, 1, (ranks, 1)), 2**24))
    counts[generator.random(ranks) < 0.2] = 0
    counts[:, generator.random(experts) < 0.2] = 0
    table = random_table(generator, 1, experts, slots, ranks)[0].astype(np.int64)
    if generator.random() < 0.5:  # slots that hold nothing, as far as every expert keeps one
        for slot in generator.permutation(slots)[: generator.integers(slots - experts + 1)]:
            if (table == table[slot]).sum() > 1:
                table[slot] = experts
    speeds = generator.choice([0.25, 0.5, 1, 1, 1], ranks) if generator.random() < 0.3 else None
    of_ranks = Ranks("expert", ranks, slots // ranks, per_node)
    return Batch(counts.astype(np.int32), table, of_ranks, speeds)


batches = st.builds(draw_batch, st.sampled_from(SHAPES), seeds)


@functools.cache
def compiled(policy: Callable, ranks: Ranks | None = None) -> Callable:
    """The policy for one rank, jitted once for each shape, whatever test asks for it."""
    return jax.jit(policy if ranks is None else functools.partial(policy, ranks=ranks))


def shares(call: Callable, batch: Batch) -> np.ndarray:
    """int64[P, S]: what each rank sends to each slot, each from its own counts."""
    tables = batch.tables
    return np.array([call(c, tables, np.int32(r)) for r, c in enumerate(batch.counts)], np.int64)


def check_shares(found: np.ndarray, batch: Batch) -> None:
    """Every token goes to a slot of its expert; none is lost or made up."""
    assert (found >= 0).all()
    for share, counts in zip(found, batch.counts, strict=True):
        by_expert = [share[batch.table == expert].sum() for expert in range(counts.size)]
        np.testing.assert_array_equal(by_expert, counts)
