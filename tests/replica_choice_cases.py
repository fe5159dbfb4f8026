"""Batches on random placements, for the tests of replica choice.

Axes: P ranks, E experts, S slots.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jax_eplb import Placement
from jax_eplb.routing import Ranks
from jax_eplb.tables import PlacementTables
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
    table: np.ndarray  # int64[S]
    ranks: Ranks

    @property
    def tables(self) -> PlacementTables:
        """Those of the one layer."""
        placement = Placement.from_slots(
            self.table[None], num_experts=self.counts.shape[1], num_ranks=self.ranks.num_ranks
        )
        with light_compile():
            return jax.tree.map(lambda table: table[0], placement.tables(with_leveling=True))


def draw_batch(shape, seed: int) -> Batch:
    """Skewed counts, of a few tokens or of millions; often none on a rank or for an expert."""
    experts, slots, ranks, per_node = shape
    generator = np.random.default_rng(seed)
    mean = generator.lognormal(generator.uniform(0, 12), 2, (1, experts))
    counts = generator.poisson(np.minimum(mean * generator.lognormal(0, 1, (ranks, 1)), 2**24))
    counts[generator.random(ranks) < 0.2] = 0
    counts[:, generator.random(experts) < 0.2] = 0
    table = random_table(generator, 1, experts, slots, ranks)[0].astype(np.int64)
    return Batch(counts.astype(np.int32), table, Ranks("expert", ranks, slots // ranks, per_node))


batches = st.builds(draw_batch, st.sampled_from(SHAPES), seeds)


@functools.cache
def compiled(policy: Callable, ranks: Ranks | None = None) -> Callable:
    """The policy for one rank, jitted once for each shape, whatever test asks for it."""
    return jax.jit(policy if ranks is None else functools.partial(policy, ranks=ranks))


def shares(call: Callable, batch: Batch, *, own_counts: bool = True) -> np.ndarray:
    """int64[P, S]: what each rank sends to each slot, from its own counts or from all."""
    tables, counts = batch.tables, jnp.asarray(batch.counts)
    given = [counts[rank] if own_counts else counts for rank in range(len(counts))]
    return np.array([call(c, tables, jnp.int32(r)) for r, c in enumerate(given)], np.int64)


def check_shares(found: np.ndarray, batch: Batch) -> None:
    """Every token goes to a slot of its expert; none is lost or made up."""
    assert (found >= 0).all()
    for share, counts in zip(found, batch.counts, strict=True):
        by_expert = [share[batch.table == expert].sum() for expert in range(counts.size)]
        np.testing.assert_array_equal(by_expert, counts)
