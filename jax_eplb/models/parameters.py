"""A decoder's parameters: made, placed on a mesh, and named in expert order for checkpoints.

Axes: L MoE layers, E experts, S slots, D embedding width, F hidden width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from jax_eplb.mesh import lay_out
from jax_eplb.models.config import DecoderConfig
from jax_eplb.models.decoder import AttentionParams, DecoderParams, DenseLayer, MoELayer
from jax_eplb.moe import MoEParams
from jax_eplb.moe.experts import experts_in_order, place_experts
from jax_eplb.moe.feed_forward import ExpertWeights, SharedWeights


def shapes(config: DecoderConfig) -> DecoderParams:
    """The shape of each array, in expert order."""
    embed, heads = config.embed_dim, config.num_heads * config.head_dim
    hidden, shared = config.expert_hidden_dim, config.shared_hidden_dim
    dense, sparse, experts = config.num_dense_layers, config.num_moe_layers, config.num_experts

    def leaf(*shape: int) -> Any:  # where a DecoderParams has an array
        return shape

    def attention(layers):
        return AttentionParams(
            norm=leaf(layers, embed),
            query_key_value=leaf(layers, embed, 3 * heads),
            out=leaf(layers, heads, embed),
        )

    def gated(layers, width):
        return SharedWeights(leaf(layers, embed, 2 * width), leaf(layers, width, embed))

    moe = MoEParams(
        router=leaf(sparse, embed, experts),
        experts=ExpertWeights(
            gate_up=leaf(sparse, experts, embed, 2 * hidden),
            down=leaf(sparse, experts, hidden, embed),
        ),
        shared=gated(sparse, shared) if shared else None,
    )
    return DecoderParams(
        embed=leaf(config.vocab_size, embed),
        dense=DenseLayer(
            attention(dense), leaf(dense, embed), gated(dense, config.dense_hidden_dim)
        ),
        sparse=MoELayer(attention(sparse), leaf(sparse, embed), moe),
        norm=leaf(embed),
        unembed=leaf(embed, config.vocab_size),
    )


def specs(config: DecoderConfig, axis_name: str) -> DecoderParams:
    """How each array is spread: experts over their slots, everything else on every device."""
    everywhere = _map_shapes(lambda name, shape: P(), config)
    bank: Any = P(None, axis_name)
    moe = everywhere.sparse.moe._replace(experts=ExpertWeights(bank, bank))
    return everywhere._replace(sparse=everywhere.sparse._replace(moe=moe))


def initialize(key: PRNGKeyArray, config: DecoderConfig, mesh: Mesh, axis_name: str):
    """Fresh float32 parameters in expert order, spread over the mesh, each made where it lives."""
    names = [name for name, _ in named(shapes(config))]
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    residual = (2 * config.num_layers) ** -0.5  # keeps the stream's variance near one

    def make(name, shape):
        if name.endswith("norm"):
            return jnp.ones(shape, jnp.float32)
        scale = shape[-2] ** -0.5
        if name == "embed":
            scale = 1.0
        elif name.endswith(("out", "down")):
            scale *= residual
        return jax.random.normal(keys[name], shape, jnp.float32) * jnp.float32(scale)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(config, axis_name))
    return jax.jit(lambda: _map_shapes(make, config), out_shardings=shardings)()


def named(params: DecoderParams) -> list[tuple[str, jax.Array]]:
    """Each array with its name in a checkpoint: its path, joined by dots."""
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=is_shape)
    return [(".".join(key.name for key in path), leaf) for path, leaf in leaves]


def on_host(params: DecoderParams, slot_to_expert: np.ndarray, num_experts: int):
    """Parameters read back in expert order, as numpy arrays."""
    read = functools.partial(
        experts_in_order, slot_to_expert=slot_to_expert, num_experts=num_experts
    )
    experts = jax.tree.map(read, params.sparse.moe.experts)
    moe = params.sparse.moe._replace(experts=experts)
    rest = params._replace(sparse=params.sparse._replace(moe=moe))
    return jax.tree.map(np.asarray, rest)


def on_mesh(
    by_expert: DecoderParams,
    slot_to_expert: np.ndarray,
    config: DecoderConfig,
    mesh: Mesh,
    axis_name: str,
    dtype,
) -> DecoderParams:
    """Parameters in expert order from the host, placed on the mesh by slot."""
    arrays = dict(named(by_expert))

    def place(name, spec):
        array = np.asarray(arrays[name]).astype(_dtype_of(name, dtype))
        sharding = NamedSharding(mesh, spec)
        if ".experts." in name:
            return place_experts(array, slot_to_expert, sharding)
        return lay_out(array, sharding)

    leaves = [place(name, spec) for name, spec in _named_specs(config, axis_name)]
    return jax.tree.unflatten(jax.tree.structure(by_expert), leaves)


def like(config: DecoderConfig, num_slots: int, mesh: Mesh, axis_name: str, dtype) -> DecoderParams:
    """What `on_mesh` makes, as shapes with their types and shardings: for reading a checkpoint."""
    spread = dict(_named_specs(config, axis_name))

    def leaf(name, shape):
        if ".experts." in name:
            shape = (shape[0], num_slots, *shape[2:])
        sharding = NamedSharding(mesh, spread[name])
        return jax.ShapeDtypeStruct(shape, _dtype_of(name, dtype), sharding=sharding)

    return _map_shapes(leaf, config)


def is_shape(x) -> bool:
    return isinstance(x, tuple) and not hasattr(x, "_fields")


def _named_specs(config: DecoderConfig, axis_name: str) -> list[tuple[str, P]]:
    flat = jax.tree.leaves(specs(config, axis_name), is_leaf=lambda x: isinstance(x, P))
    return [(name, spec) for (name, _), spec in zip(named(shapes(config)), flat, strict=True)]


def _dtype_of(name: str, dtype):
    """The router stays float32: it decides by small differences."""
    return jnp.float32 if name.endswith("router") else dtype


def _map_shapes(function, config: DecoderConfig) -> DecoderParams:
    tree = shapes(config)
    leaves = [function(name, shape) for name, shape in named(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_shape), leaves)
