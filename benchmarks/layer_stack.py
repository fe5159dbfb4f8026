"""A stack of MoE layers over a mesh, in the sizes of real models, for benchmarks of many devices.

Axes: L layers, E experts, S slots, P ranks, N slots of a rank, T tokens of a rank, K choices of a
token, D embedding width, F hidden width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jax_eplb.mesh import lay_out
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.exchange_sizes import IMPLEMENTATIONS
from jax_eplb.moe.feed_forward import ExpertWeights
from jax_eplb.moe.forward import MoEParams, moe_forward
from jax_eplb.placement import Placement
from jax_eplb.tables import PlacementTables

AXIS = "expert"
_SEED = 20261126
_MEMORY = 0.85  # of a device, for experts


class Shape(NamedTuple):
    """Sizes of a model's MoE layers."""

    name: str
    embed: int  # D
    hidden: int  # F
    experts: int  # E
    top_k: int  # K

    def config(self, num_slots: int, num_ranks: int, **options: Any) -> MoEConfig:
        return MoEConfig(
            self.embed, self.hidden, self.experts, self.top_k, num_slots, num_ranks, **options
        )

    def row_bytes(self, dtype) -> int:
        return self.embed * jnp.dtype(dtype).itemsize

    def expert_bytes(self, dtype) -> int:
        return 3 * self.embed * self.hidden * jnp.dtype(dtype).itemsize


# From the models' published configurations.
QWEN3_30B = Shape("Qwen3-30B", 2048, 768, 128, 8)
DEEPSEEK_R1 = Shape("DeepSeek-R1", 7168, 2048, 256, 8)
GPT_OSS_20B = Shape("gpt-oss-20b", 2880, 2880, 32, 4)


def small(shape: Shape) -> Shape:
    """The same experts and choices, narrow enough for a CPU."""
    return shape._replace(name=f"{shape.name}, narrow", embed=256, hidden=32)


def usable_exchanges() -> tuple[str, ...]:
    """The ways rows can travel here: `ragged` not on a CPU, nor between processes.

    XLA of jax 0.11 refuses the latter, unless its flag
    `xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback` says otherwise.
    """
    ragged = jax.default_backend() != "cpu" and jax.process_count() == 1
    return tuple(name for name in IMPLEMENTATIONS if ragged or name != "ragged")


def layers_that_fit(shape: Shape, num_slots: int, num_layers: int, mesh: Mesh, dtype) -> int:
    """As many of the layers as the devices have memory for, beside a copy of one; at least one."""
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return num_layers
    of_layer = num_slots // mesh.size * shape.expert_bytes(dtype)
    fitting = min(num_layers, max(1, int(_MEMORY * limit / of_layer) - 1))
    # Processes may see a little more memory or less.
    return int(multihost_utils.broadcast_one_to_all(np.int32(fitting)))


def make_params(
    shape: Shape, config: MoEConfig, mesh: Mesh, num_layers: int, dtype, router=None
) -> MoEParams:
    """Random weights [L, S, …], each rank's made where they stay; `router` [L, D, E] if given."""
    whole, bank = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, AXIS))

    def local():
        key = jax.random.fold_in(jax.random.key(_SEED), jax.lax.axis_index(AXIS))

        def layer(key):
            up, down = jax.random.split(key)
            slots, (wide, narrow) = config.slots_per_rank, (shape.embed, shape.hidden)
            gate_up = jax.random.normal(up, (slots, wide, 2 * narrow), dtype)
            return ExpertWeights(
                gate_up * wide**-0.5,
                jax.random.normal(down, (slots, narrow, wide), dtype) * narrow**-0.5,
            )

        return jax.lax.map(layer, jax.random.split(key, num_layers))

    make = jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P(None, AXIS))
    experts = jax.jit(make, out_shardings=bank)()
    if router is None:
        router = np.random.default_rng(_SEED).normal(
            size=(num_layers, shape.embed, shape.experts), scale=shape.embed**-0.5
        )
    return MoEParams(lay_out(router.astype(np.float32), whole), experts)


def place_tables(placement: Placement, config: MoEConfig, mesh: Mesh) -> PlacementTables:
    """The placement's tables, equal on every device."""
    tables = placement.tables(with_leveling=config.needs_leveling)
    return lay_out(jax.tree.map(np.asarray, tables), NamedSharding(mesh, P()))


def draw_tokens(shape: Shape, num_tokens: int, mesh: Mesh, dtype) -> Array:
    """Random tokens [P·T, D] of all ranks, each rank's made where they stay."""
    of_rank = num_tokens // mesh.shape[AXIS]

    def local():
        key = jax.random.fold_in(jax.random.key(_SEED), jax.lax.axis_index(AXIS))
        return jax.random.normal(key, (of_rank, shape.embed), dtype)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P(AXIS)))()


def spread(array: np.ndarray, mesh: Mesh, axis: int) -> Array:
    """The array divided among the ranks along that axis."""
    return lay_out(array, NamedSharding(mesh, P(*(None,) * axis, AXIS)))


def stack_step(config: MoEConfig, mesh: Mesh) -> Callable:
    """(params, tables, tokens [P·T, D]) -> tokens of the last layer, counts [P, L, E], [P, L].

    Each layer gets the tokens of the one before plus its result, normalised.
    """

    def local(params, tables, tokens):
        mask = jnp.ones(len(tokens), bool)
        rows, tables_of = tables.in_one_array()

        def layer(tokens, inputs):
            index, router, row = inputs
            own = MoEParams(router, params.experts._replace(layer=index))
            out = moe_forward(own, tables_of(row), tokens, mask, config=config, axis_name=AXIS)
            wide = tokens.astype(jnp.float32) + out.tokens.astype(jnp.float32)
            scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=1, keepdims=True) + 1e-6)
            return (wide * scale).astype(tokens.dtype), (out.expert_tokens, out.rank_tokens)

        tokens, counts = jax.lax.scan(layer, tokens, (_layers(params), params.router, rows))
        return tokens, jax.tree.map(lambda x: x[None], counts)

    return _sharded(local, mesh, (params_spec(), P(), P(AXIS)))


def separate_layers(config: MoEConfig, mesh: Mesh) -> Callable:
    """As `stack_step`, but each layer gets tokens of its own, [L, P·T, D]; gives counts alone."""

    def local(params, tables, tokens):
        mask = jnp.ones(tokens.shape[1], bool)
        rows, tables_of = tables.in_one_array()

        def layer(total, inputs):
            index, router, row, tokens = inputs
            own = MoEParams(router, params.experts._replace(layer=index))
            out = moe_forward(own, tables_of(row), tokens, mask, config=config, axis_name=AXIS)
            # What is not read would not be computed.
            total = total + out.tokens.astype(jnp.float32).sum(axis=0)
            return total, (out.expert_tokens, out.rank_tokens)

        zero = jax.lax.pcast(jnp.zeros(tokens.shape[2], jnp.float32), AXIS, to="varying")
        total, counts = jax.lax.scan(layer, zero, (_layers(params), params.router, rows, tokens))
        return total[None], jax.tree.map(lambda x: x[None], counts)

    return _sharded(local, mesh, (params_spec(), P(), P(None, AXIS)))


def _layers(params: MoEParams) -> Array:
    """The numbers of the layers, to be scanned over in place of the experts' stack."""
    return jnp.arange(len(params.router), dtype=jnp.int32)


def params_spec() -> MoEParams:
    bank: Any = P(None, AXIS)
    router: Any = P()
    return MoEParams(router, ExpertWeights(bank, bank))


def _sharded(local, mesh: Mesh, in_specs) -> Callable:
    spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=P(AXIS))
    return jax.jit(spread(local))
