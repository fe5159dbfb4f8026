"""One process of a run over several: applies a layer and writes this process's part of it.

python -m tests.layer_process PROCESS PROCESSES PORT FOLDER
"""

import sys
from pathlib import Path

import jax

RANKS = 4


def main(process: int, processes: int, port: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", RANKS // processes)
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    apply(process, processes, folder)


def apply(process: int, processes: int, folder: Path) -> None:
    """By as many processes as there are now."""
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_eplb import MoE, MoEConfig, Placement, expert_mesh

    config = MoEConfig(
        embed_dim=16,
        hidden_dim=8,
        num_experts=8,
        experts_per_token=2,
        num_slots=12,
        num_ranks=RANKS,
        moe_max_num_tokens=16,
        replica_choice="balanced",
        ranks_per_node=2,
    )
    mesh = expert_mesh(RANKS)
    placement = Placement.from_slots(
        [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], num_experts=8, num_ranks=RANKS
    )
    layer = MoE(config, mesh=mesh, rngs=nnx.Rngs(0), placement=placement)
    tokens = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    spread = NamedSharding(mesh, P("expert"))
    out = layer(jax.make_array_from_callback(tokens.shape, spread, lambda index: tokens[index]))
    for shard in out.addressable_shards:
        np.save(folder / f"rows_{processes}_{shard.index[0].start or 0}.npy", shard.data)
    if process == 0:
        np.save(folder / f"counts_{processes}.npy", layer.expert_tokens[...].addressable_data(0))
        np.save(folder / f"ranks_{processes}.npy", layer.rank_tokens[...].addressable_data(0))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
