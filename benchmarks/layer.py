"""Time of one whole MoE layer beside the least that the device needs, and beside transformers.

    python -m benchmarks.layer [--layer NAME] [--stages] [--json]

The layer routes, counts the load, sorts, gathers, multiplies with gate and up and with down, and
combines, on one rank, in bfloat16. Routing is skewed: a lognormal(0, 0.5) factor on each expert's
odds, so that the busiest has three to six times the mean load. On a GPU the layers are those of
Qwen3-30B and Mixtral 8x7B, and 64 of DeepSeek-R1's experts, and transformers' block of experts
(`grouped_mm`, compiled) runs on the same inputs, where it is installed; on a CPU a small layer runs
with `lax.ragged_dot` as the peer.

The floor is the larger of the bytes (weights of the experts that get tokens, tokens in and out)
over the bandwidth, and of the products' operations over the rate of a large matrix product; both
rates are measured in this run or given. `of floor` is the floor over the time: higher is better.
"""

import argparse
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from rich.console import Console

from benchmarks.ceilings import (
    Ceilings,
    add_ceiling_options,
    burst_ms,
    compile_all,
    device_ms,
    given_or_measured,
)
from benchmarks.grouped_matmul import torch_times
from benchmarks.machine import describe
from benchmarks.tables import Column, Table
from jax_eplb.kernels import counting_sort, grouped_matmul, logits, take_rows
from jax_eplb.mesh import expert_mesh
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.feed_forward import ExpertWeights
from jax_eplb.moe.forward import MoEParams, moe_forward
from jax_eplb.routing import RouterConfig, route
from jax_eplb.tables import derive_tables

_SEED = 20261126
_SKEW = 0.5  # standard deviation of the experts' log odds


class Layer(NamedTuple):
    """Sizes of one layer and of its batch."""

    name: str
    tokens: int  # T
    embed: int  # D
    hidden: int  # F
    experts: int  # E
    top_k: int  # K


GPU_LAYERS = (
    Layer("Qwen3-30B, 4096 tokens", 4096, 2048, 768, 128, 8),
    Layer("Qwen3-30B, 512 tokens", 512, 2048, 768, 128, 8),
    Layer("Qwen3-30B, 64 tokens", 64, 2048, 768, 128, 8),
    Layer("Mixtral 8x7B, 4096 tokens", 4096, 4096, 14336, 8, 2),
    Layer("Mixtral 8x7B, 64 tokens", 64, 4096, 14336, 8, 2),
    Layer("64 experts of DeepSeek-R1, 4096 tokens", 4096, 7168, 2048, 64, 8),
)
CPU_LAYERS = (Layer("small, 256 tokens", 256, 128, 64, 16, 4),)
STAGES = ("route", "sort", "gather", "up", "down", "combine")


@functools.cache
def draw(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T, D] and the router [D, E], float32.

    The first feature of every token is 1, so the router's first row is a bias of the logits: that
    makes the odds of experts lognormal in any framework.
    """
    generator = np.random.default_rng([_SEED, *layer[1:]])
    tokens = generator.normal(size=(layer.tokens, layer.embed)).astype(np.float32)
    router = generator.normal(size=(layer.embed, layer.experts)) / layer.embed**0.5
    tokens[:, 0], router[0] = 1, generator.normal(scale=_SKEW, size=layer.experts)
    return tokens, router.astype(np.float32)


def parameters(layer: Layer, router: np.ndarray, dtype: str) -> MoEParams:
    up, down = jax.random.split(jax.random.key(_SEED))
    experts = ExpertWeights(
        _bank(up, (layer.experts, layer.embed, 2 * layer.hidden), dtype),
        _bank(down, (layer.experts, layer.hidden, layer.embed), dtype),
    )
    return MoEParams(jnp.asarray(router), experts)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _bank(key, shape: tuple[int, ...], dtype: str):
    return jax.random.normal(key, shape, dtype) * shape[1] ** -0.5


def on_one_rank(layer: Layer, kernel: str | None):
    """The library's layer: (parameters, tokens) -> its output."""
    config = MoEConfig(
        layer.embed, layer.hidden, layer.experts, layer.top_k, layer.experts, 1, kernel=kernel
    )
    slots = jnp.arange(layer.experts)[None]
    tables = derive_tables(slots, num_experts=layer.experts, num_ranks=1).of_layer(0)

    def local(params, tables, tokens):
        mask = jnp.ones(len(tokens), bool)
        out = moe_forward(params, tables, tokens, mask, config=config)
        return out.tokens, out.expert_tokens

    split, whole = P("expert"), P()
    params = jax.eval_shape(functools.partial(inputs, layer, "float32"))[0]
    specs = jax.tree.unflatten(jax.tree.structure(params), [whole, split, split])
    sharded = jax.shard_map(
        local, mesh=expert_mesh(1), in_specs=(specs, whole, split), out_specs=split
    )
    return lambda params, tokens: sharded(params, tables, tokens)


def measure(layers: list[Layer], dtype: str, ceilings: Ceilings) -> list[dict]:
    """Times in ms of our layers, with and without keeping their counts, and their floors."""
    drawn = {layer: functools.partial(inputs, layer, dtype) for layer in layers}
    calls = {}
    for layer in layers:
        arguments = jax.eval_shape(drawn[layer])
        forward = on_one_rank(layer, None)

        def counting(params, tokens, load, forward=forward):
            out, expert_tokens = forward(params, tokens)
            return out, load + expert_tokens

        def without(params, tokens, load, forward=forward):
            return forward(params, tokens)[0], load

        calls |= {(layer, "counting"): (counting, arguments), (layer, ""): (without, arguments)}
        if jax.default_backend() == "cpu":
            plain = on_one_rank(layer, "ragged_dot")
            peer = lambda params, tokens, load, plain=plain: plain(params, tokens)  # noqa: E731
            calls[layer, "peer"] = (peer, arguments)
    compiled = compile_all(calls)
    return [
        _times(layer, drawn[layer](), compiled, jnp.dtype(dtype).itemsize, ceilings)
        for layer in layers
    ]


def _times(layer: Layer, arguments, compiled, itemsize: int, ceilings: Ceilings) -> dict:
    def call(kind):
        if isinstance(found := compiled.get((layer, kind)), str):
            raise RuntimeError(f"{layer.name}: {found}")
        return found

    def ms(kind):
        return None if call(kind) is None else burst_ms(call(kind), *arguments)

    used = int((call("counting")(*arguments)[1] > 0).sum())
    expert = 3 * layer.embed * layer.hidden
    num_bytes = itemsize * (used * expert + 2 * layer.tokens * layer.embed)
    floor = ceilings.floor_ms(num_bytes, 2 * layer.tokens * layer.top_k * expert)
    row: dict = {"layer": layer.name, "experts": used, "floor_ms": floor}
    row |= {"ms": ms("counting"), "without_counting_ms": ms(""), "peer_ms": ms("peer")}
    row["of_floor"] = floor / row["ms"]
    row["counting"] = 100 * (row["ms"] / row["without_counting_ms"] - 1)
    return row


def inputs(layer: Layer, dtype: str):
    """Parameters, tokens, and a count of the load to add to."""
    tokens, router = draw(layer)
    load = jnp.zeros(layer.experts, jnp.int32)
    return parameters(layer, router, dtype), jnp.asarray(tokens, dtype), load


def stages(layers: list[Layer], dtype: str) -> list[dict[str, float]]:
    """Device time in ms of each stage on its own, with the results of the ones before."""
    calls, programs = {}, {layer: _stage_program(layer) for layer in layers}
    for layer, program in programs.items():
        state = jax.eval_shape(functools.partial(_first_state, layer, dtype))
        for name, function, needs in program:
            calls[layer, name] = function, [state[need] for need in needs]
            state |= jax.eval_shape(function, *calls[layer, name][1])
    compiled = compile_all(calls)
    times = []
    for layer, program in programs.items():
        state, row = _first_state(layer, dtype), {}
        for name, _, needs in program:
            run, arguments = compiled[layer, name], [state[need] for need in needs]
            if isinstance(run, str):
                raise RuntimeError(f"{layer.name}, {name}: {run}")
            row[name] = device_ms(run, *arguments)
            state |= run(*arguments)
        times.append(row)
    return times


def _first_state(layer: Layer, dtype: str) -> dict[str, jax.Array]:
    params, tokens, _ = inputs(layer, dtype)
    experts = params.experts
    banks = {"up": experts.gate_up, "down": experts.down}
    return {"tokens": tokens, "router": params.router} | banks


def _stage_program(layer: Layer):
    """Name, function and arguments of each stage; it returns what later ones need, by name."""

    def routed(tokens, router):
        routes = route(logits(tokens, router), layer.top_k, RouterConfig())
        return routes._asdict()

    def sort(experts):
        order = counting_sort(experts.reshape(-1), layer.experts)
        return order._asdict() | {"place": order.place.reshape(experts.shape)}

    def gather(tokens, order):
        return {"rows": take_rows(tokens, order, layer.top_k)}

    def up(rows, weights, counts):
        return {"hidden": grouped_matmul(rows, weights, counts, activation="swiglu")}

    def down(hidden, weights, counts):
        return {"results": grouped_matmul(hidden, weights, counts)}

    def combine(results, place, weights):
        parts = results[place].astype(jnp.float32) * weights[..., None]
        return {"out": functools.reduce(jnp.add, jnp.unstack(parts, axis=1)).astype(results.dtype)}

    needs = (
        ("tokens", "router"),
        ("experts",),
        ("tokens", "order"),
        ("rows", "up", "counts"),
        ("hidden", "down", "counts"),
        ("results", "place", "weights"),
    )
    return list(zip(STAGES, (routed, sort, gather, up, down, combine), needs, strict=True))


def peer_times(layers) -> list[float | None]:
    """transformers' layer on the same inputs, in ms; None where it did not run."""
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for index, layer in enumerate(layers):
            tokens, router = draw(layer)
            file = Path(folder) / f"{index}.npz"
            np.savez(file, tokens=tokens, router=router)
            cases.append([*layer[1:], str(file)])
        found = torch_times({"layer": cases})
    return [None] * len(cases) if found is None else found["times"]


def columns(peer: str, with_stages: bool) -> list[Column]:
    """The table's columns."""
    shown = [
        Column("layer", "layer"),
        Column("experts", "experts used", 0),
        Column("floor_ms", "floor ms", 3),
        Column("peer_ms", f"{peer} ms", 3),
        Column("ms", "jax_eplb ms", 3),
        Column("of_peer", "times faster", 2),
        Column("of_floor", "of floor", 2),
        Column("counting", "counting %", 1),
    ]
    return shown + [Column(name, name, 3) for name in STAGES if with_stages]


def main(argv: list[str] | None = None) -> None:
    # Else JAX would take the memory that PyTorch needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description="Time of whole MoE layers.")
    parser.add_argument("--layer", action="append", help="only those whose name holds this")
    parser.add_argument("--stages", action="store_true", help="time each stage on its own too")
    add_ceiling_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--verbose", action="store_true", help="why a peer could not be timed")
    arguments = parser.parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    known = GPU_LAYERS if on_gpu else CPU_LAYERS
    layers = [
        layer
        for layer in known
        if any(part in layer.name for part in arguments.layer or [layer.name])
    ]
    dtype = "bfloat16" if on_gpu else "float32"
    ceilings = given_or_measured(arguments, dtype)
    rows = measure(layers, dtype, ceilings)
    if arguments.stages:
        for row, times in zip(rows, stages(layers, dtype), strict=True):
            row |= times
    if on_gpu:
        for row, ms in zip(rows, peer_times(layers), strict=True):
            row["peer_ms"] = ms
    for row in rows:
        if row["peer_ms"] is not None:
            row["of_peer"] = row["peer_ms"] / row["ms"]
    machine = describe() | {"dtype": dtype} | ceilings._asdict()
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    title = (
        f"One MoE layer, {dtype}, {machine['device']}; ceilings "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.1f} TFLOP/s"
    )
    peer = "transformers" if on_gpu else "ragged_dot"
    table = Table(title, columns(peer, arguments.stages), rows)
    Console(width=160).print(table.as_rich())


if __name__ == "__main__":
    main()
