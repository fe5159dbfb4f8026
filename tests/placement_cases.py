"""Valid placements drawn at random, for the tests of whatever must not depend on them.

Axes: L layers, E experts, S slots, P ranks.
"""

import numpy as np
from hypothesis import strategies as st

from jax_eplb.tables import max_replicas


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


def random_tables_without_duplicates(
    generator: np.random.Generator, num_layers: int, num_experts: int, num_slots: int, ranks: int
) -> np.ndarray:
    """As `random_table`, with different experts on each rank; S <= E P."""
    rows: list[np.ndarray] = []
    while len(rows) < num_layers:
        row = random_table(generator, 1, num_experts, num_slots, ranks)[0]
        if all(len(set(held.tolist())) == held.size for held in row.reshape(ranks, -1)):
            rows.append(row)
    return np.array(rows)


def risk_by_counting(
    table: np.ndarray, num_experts: int, num_nodes: int, least: int = 1
) -> np.ndarray:
    """bool[L, E]: replicas, if several, on one node, or fewer than `least`; one by one."""
    risk = []
    for row in np.asarray(table):
        nodes = [np.flatnonzero(row == e) * num_nodes // row.size for e in range(num_experts)]
        risk.append([len(n) < least or (len(n) > 1 and len(set(n.tolist())) == 1) for n in nodes])
    return np.array(risk)


# (E, S, P). Few, as each shape compiles anew.
sizes = st.sampled_from([(1, 1, 1), (1, 4, 2), (6, 6, 3), (7, 10, 5), (5, 16, 4), (9, 12, 2)])
seeds = st.integers(0, 2**32 - 1)
