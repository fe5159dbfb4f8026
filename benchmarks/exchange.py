"""The exchange of tokens between ranks: peak memory and time, by implementation and cap.

    python -m benchmarks.exchange [--ranks P] [--tokens T] [--json]

One layer on all ranks, once with the load that chance makes and once with every token going to
experts of rank 0. Memory is what XLA plans for one device beside arguments and results; time is the
median of warm calls. Where there are too few devices the CPU simulates them: memory is then as on
real ones, time is not.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.tables import Column, Table
from benchmarks.timing import time_warm
from jax_eplb.mesh import expert_mesh, simulate_devices
from jax_eplb.moe import MoE, MoEConfig

_SEED = 20261126
COLUMNS = [
    Column("exchange", "exchange"),
    Column("cap", "moe_max_num_tokens", 0),
    Column("load", "load"),
    Column("memory_mib", "memory MiB", 1),
    Column("ms", "ms", 2),
]


def layer_of(arguments: argparse.Namespace, exchange: str, cap: int | None, skewed: bool) -> MoE:
    """A layer whose router, if skewed, sends every token to the first experts, rank 0's."""
    config = MoEConfig(
        embed_dim=arguments.embed_dim,
        hidden_dim=arguments.hidden_dim,
        num_experts=arguments.experts,
        experts_per_token=arguments.top_k,
        num_slots=arguments.experts,
        num_ranks=arguments.ranks,
        exchange=exchange,
        moe_max_num_tokens=cap,
    )
    layer = MoE(config, mesh=expert_mesh(arguments.ranks), rngs=nnx.Rngs(0), dtype=arguments.dtype)
    if skewed:
        router = np.zeros((config.embed_dim, config.num_experts), np.float32)
        router[:, : config.experts_per_token] = np.arange(config.experts_per_token, 0, -1)
        layer.router[...] = jax.device_put(router, layer.router[...].sharding)
    return layer


def measure(arguments: argparse.Namespace, exchange: str, cap: int | None, skewed: bool) -> dict:
    """Memory in MiB and time in ms of one layer."""
    layer = layer_of(arguments, exchange, cap, skewed)
    # Not negative: so the skewed router's logits are in the order of its experts.
    tokens = np.abs(
        np.random.default_rng(_SEED).normal(
            size=(arguments.ranks * arguments.tokens, arguments.embed_dim)
        )
    )
    tokens = jax.device_put(
        jnp.asarray(tokens, arguments.dtype), NamedSharding(layer.mesh, layer.axes.tokens)
    )
    graph, state = nnx.split(layer)
    call: Any = jax.jit(lambda state, tokens: nnx.merge(graph, state, copy=True)(tokens))
    compiled = call.lower(state, tokens).compile()
    return {
        "exchange": exchange,
        "cap": cap,
        "load": "all to rank 0" if skewed else "by chance",
        "memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "ms": time_warm(lambda: compiled(state, tokens), arguments.repeats).median_ms,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the exchange of tokens.")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--caps", type=int, nargs="*", default=[1024, 256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)
    simulate_devices(arguments.ranks)
    # JAX has no ragged exchange for CPUs.
    ragged = ["ragged"] if jax.default_backend() != "cpu" else []
    rows = [
        measure(arguments, exchange, cap, skewed)
        for exchange in ("waves", "all_gather", *ragged)
        for cap in (None, *arguments.caps)
        for skewed in (False, True)
    ]
    if arguments.json:
        print(json.dumps({"machine": describe(), "rows": rows}))
        return
    title = (
        f"{arguments.ranks} ranks, {arguments.tokens} tokens each, top {arguments.top_k} of "
        f"{arguments.experts} experts, {arguments.embed_dim} × {arguments.hidden_dim}, "
        f"{arguments.dtype}, {describe()['device']}"
    )
    Console(width=120).print(Table(title, COLUMNS, rows).as_rich())


if __name__ == "__main__":
    main()
