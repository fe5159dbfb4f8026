"""The ways that tokens travel between real devices: time, bandwidth and memory.

Axes: L layers, P ranks, T tokens of a rank, K choices of a token, D embedding width.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.ceilings import burst_ms, compile_all
from benchmarks.layer_stack import (
    AXIS,
    Shape,
    draw_tokens,
    layers_that_fit,
    make_params,
    place_tables,
    stack_step,
)
from benchmarks.progress import say
from benchmarks.tables import Column, Table
from benchmarks.timing import in_turn
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.exchange import exchange
from jax_eplb.placement import Placement, fewest_slots
from jax_eplb.routing import RouterConfig, order_without_replicas, route_and_sort

_FULLEST = 1.05  # pair of ranks, in even shares, where large batches are routed by chance
COLUMNS = [
    Column("shape", "layers of"),
    Column("tokens", "tokens a rank", 0),
    Column("exchange", "exchange"),
    Column("exchange_ms", "exchange alone ms", 3),
    Column("gigabytes_per_second", "GB/s", 0),
    Column("of_link", "of the link", 2),
    Column("layer_ms", "one layer ms", 3),
    Column("layers", "in the stack", 0),
    Column("stack_ms", "stack, ms a layer", 3),
    Column("memory_mib", "memory MiB", 0),
]


def measure_exchange(
    mesh: Mesh,
    shapes: Sequence[Shape],
    batches: Sequence[int],
    *,
    num_layers: int,
    link: float,
    dtype,
    rounds: int,
    exchanges: Sequence[str],
    waves: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of tokens, and exchange; `link` is in bytes/s each way.

    Beside the `exchanges`, `waves` bounded so that a batch takes so many of them.
    """
    num_ranks = mesh.shape[AXIS]
    for shape in shapes:
        num_slots = fewest_slots(shape.experts, num_ranks)
        plain = shape.config(num_slots, num_ranks)
        layers = layers_that_fit(shape, num_slots, num_layers, mesh, dtype)
        placement = Placement.default(
            num_experts=shape.experts, num_ranks=num_ranks, num_layers=layers
        )
        params = None  # the last shape's, before there are others
        params = make_params(shape, plain, mesh, layers, dtype)
        tables = place_tables(placement, plain, mesh)
        for num_tokens in batches:
            say(f"exchange, {shape.name}, {num_tokens} tokens")
            tokens = draw_tokens(shape, num_ranks * num_tokens, mesh, dtype)
            ways: dict[str, dict[str, Any]] = {name: {"exchange": name} for name in exchanges}
            rows = num_tokens * shape.top_k  # of a rank
            for n in waves:
                ways[f"{n} waves"] = {"moe_max_num_tokens": math.ceil(_FULLEST * rows / n)}
            programs = {
                name: _programs(shape.config(num_slots, num_ranks, **options), mesh)
                for name, options in ways.items()
            }
            yield from _compare(programs, params, tables, tokens, shape, dtype, link, rounds)


def _programs(config: MoEConfig, mesh: Mesh) -> tuple[Callable, Callable]:
    return exchange_alone(config, mesh), stack_step(config, mesh)


def _compare(programs, params, tables, tokens, shape, dtype, link, rounds) -> Iterator[dict]:
    """All implementations in turn on the same tokens."""
    first = jax.tree.map(_first_layer, (params, tables))
    arguments = {
        "exchange_ms": (params.router[0], tables.first_slot[0], tokens),
        "layer_ms": (*first, tokens),
        "stack_ms": (params, tables, tokens),
    }
    compiled = compile_all(
        {
            (name, key): (program, arguments[key])
            for name, (alone, step) in programs.items()
            for key, program in zip(arguments, (alone, step, step), strict=True)
        }
    )
    for (name, key), program in compiled.items():
        if isinstance(program, str):
            raise RuntimeError(f"{shape.name}, {name}, {key}: {program}")
    # In bursts: launching one call takes several devices longer than a small exchange does.
    clocks = {
        key: functools.partial(burst_ms, program, *arguments[key[1]], bursts=1)
        for key, program in compiled.items()
    }
    times = in_turn(clocks, rounds)
    num_ranks = tokens.sharding.mesh.shape[AXIS]
    per_rank = len(tokens) // num_ranks
    # What the routing asks for: each choice of an expert elsewhere, there and back.
    crossing = 2 * per_rank * shape.top_k * shape.row_bytes(dtype) * (num_ranks - 1) / num_ranks
    for name in programs:
        found = {key: times[name, key].median_ms for key in arguments}
        found["stack_ms"] /= params.router.shape[0]
        rate = 1e3 * crossing / found["exchange_ms"]
        yield {
            "shape": shape.name,
            "tokens": per_rank,
            "exchange": name,
            **found,
            "layers": params.router.shape[0],
            "bytes_each_rank": crossing,
            "gigabytes_per_second": rate / 1e9,
            "of_link": rate / 2 / link,
            "memory_mib": compiled[name, "layer_ms"].memory_analysis().temp_size_in_bytes / 2**20,
        }


def exchange_alone(config: MoEConfig, mesh: Mesh) -> Callable:
    """Routing, then rows there and back with no expert in between, and the weighted sum."""
    ranks = config.ranks(AXIS)

    def local(router, first_slot, tokens):
        # Cheap logits: a product of the width would take longer than the exchange.
        logits = tokens[:, : router.shape[1]].astype(jnp.float32)
        mask = jnp.ones(len(tokens), bool)
        routes, found = route_and_sort(
            logits, mask, config.experts_per_token, RouterConfig(), None, first_slot
        )
        order = order_without_replicas(found, ranks)
        sizes = config.exchange_sizes(len(tokens))
        out, rows = exchange(
            lambda rows, params, group_sizes: rows,
            sizes,
            ranks,
            tokens,
            routes.weights,
            order,
            (),
        )
        return out.astype(tokens.dtype), rows[None]

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=(P(AXIS), P(AXIS))
    )
    return jax.jit(spread)


@jax.jit
def _first_layer(bank):
    return bank[:1]


def exchange_table(rows: list[dict], link: float) -> Table:
    note = (
        f"GB/s: the rows that the routing sends to other ranks and back, over the time of the "
        f"exchange alone; of the link: half of it over {link / 1e9:.0f} GB/s, what a rank may send "
        "and receive at once. Memory: what the program of one layer needs beside its arguments."
    )
    return Table("Exchange of tokens between devices", COLUMNS, rows, [note])
