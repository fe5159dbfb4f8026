"""Valid placements drawn at random, for the tests of whatever must not depend on them.

Axes: L layers, E experts, S slots, P ranks.
"""

import numpy as np
from hypothesis import strategies as st

from jax_eplb.placement import max_replicas


def random_table(
    generator: np.random.Generator, num_layers: int, num_experts: int, num_slots: int, ranks: int
) -> np.ndarray:
    """int32[L, S]: every expert placed, spare slots given out at random, all in random order."""
    bound = max_replicas(num_experts, num_slots, ranks)
    rows = []
    for _ in range(num_layers):
        count = np.ones(num_experts, int)
        for _ in range(num_slots - num_experts):
            count[generator.choice(np.flatnonzero(count < bound))] += 1
        rows.append(generator.permutation(np.repeat(np.arange(num_experts), count)))
    return np.array(rows, np.int32)


# (E, S, P). Few, as each shape compiles anew.
sizes = st.sampled_from([(1, 1, 1), (1, 4, 2), (6, 6, 3), (7, 10, 5), (5, 16, 4), (9, 12, 2)])
seeds = st.integers(0, 2**32 - 1)
