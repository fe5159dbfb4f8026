"""One process of a run over several: moves experts again and again, and checks its own slots.

python -m tests.moving_process PROCESS PROCESSES PORT RANKS PLACEMENTS MORE

with MORE = 1 also from host copies, and to another mesh.
"""

import sys

import jax


def main(process: int, processes: int, port: int, ranks: int, placements: int, more: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", ranks // processes)
    jax.distributed.initialize(f"localhost:{port}", processes, process)

    from itertools import islice

    import numpy as np

    from jax_eplb import expert_mesh
    from jax_eplb.moving import HostCopy, rebalance, reshard
    from tests.moving_cases import assert_holds, placement, stacked_tree, tables

    layers, experts, slots = 1 + more, 2 * ranks, 3 * ranks
    mesh = expert_mesh(ranks)
    drawn = tables(0, layers, experts, slots, ranks)
    table = next(drawn)
    tree = stacked_tree(table, experts, mesh)
    before = placement(table, experts, ranks)
    copy = HostCopy(tree, before) if more else None
    for number, table in enumerate(islice(drawn, placements)):
        after = placement(table, experts, ranks)
        # Now and then in many waves, with rows held; most often in one.
        tree = rebalance(tree, before, after, slots_at_once={4: 1, 9: 2}.get(number % 10, 8))
        assert_holds(tree, table, experts)
        before = after
    if not more:
        return
    # A rank is lost with all it held: the host copies fill it again, and whatever else lacks.
    table = next(drawn)
    after = placement(table, experts, ranks)
    tree = rebalance(tree, before, after, lost_ranks=[ranks - 1], host=copy)
    assert_holds(tree, table, experts)
    smaller = jax.sharding.Mesh(
        np.array(jax.devices()).reshape(processes, -1)[:, : ranks // processes // 2].reshape(-1),
        ("expert",),
    )
    fewer = next(tables(1, layers, experts, 4 * smaller.size, smaller.size))
    tree = reshard(tree, after, placement(fewer, experts, smaller.size), smaller)
    assert_holds(tree, fewer, experts)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:7]))
    print("moved")
