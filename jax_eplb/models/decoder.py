"""A decoder with MoE layers, as functions of arrays that run inside `shard_map`.

Each rank decodes its own sequences (attention data parallelism) while the experts are spread over
all ranks. Axes: B sequences of this rank, T tokens of each, M = B·T rows, C positions of the
cache, H heads, D embedding width, L MoE layers, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels import by_row_blocks
from jax_eplb.models.config import DecoderConfig
from jax_eplb.moe import MoEConfig, MoEParams, moe_forward
from jax_eplb.moe.feed_forward import SharedWeights, shared_feed_forward
from jax_eplb.tables import PlacementTables


class AttentionParams(NamedTuple):
    norm: Float[Array, "D"]
    query_key_value: Float[Array, "D 3*H*head"]
    out: Float[Array, "H*head D"]


class DenseLayer(NamedTuple):
    attention: AttentionParams
    norm: Float[Array, "D"]
    feed_forward: SharedWeights


class MoELayer(NamedTuple):
    attention: AttentionParams
    norm: Float[Array, "D"]
    moe: MoEParams


class DecoderParams(NamedTuple):
    """The layers' arrays have a leading axis: dense layers, and MoE layers."""

    embed: Float[Array, "V D"]
    dense: DenseLayer
    sparse: MoELayer
    norm: Float[Array, "D"]
    unembed: Float[Array, "D V"]


class Cache(NamedTuple):
    """Keys and values by layer (dense layers first), sequence and position."""

    keys: Float[Array, "layers B C H head"]
    values: Float[Array, "layers B C H head"]


class Batch(NamedTuple):
    """Tokens of this rank's sequences; padding tokens are not valid."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    seats: Int[Array, "B"]  # each sequence's row of the cache


class DecoderOutput(NamedTuple):
    hidden: Float[Array, "B T D"]  # normalised; `unembed` gives the logits
    cache: Cache | None
    expert_tokens: Int[Array, "L E"]
    rank_tokens: Int[Array, "L"]
    router_logits: Float[Array, "L M E"]


def decode(
    params: DecoderParams,
    tables: PlacementTables,  # with a leading axis L
    batch: Batch,
    cache: Cache | None,
    *,
    config: DecoderConfig,
    moe: MoEConfig,
    axis_name: str,
) -> DecoderOutput:
    """Run the batch through all layers.

    With a cache, the batch's keys and values are written to it at `positions`, and each token
    attends to what its sequence has written up to its own position; without one, to the batch's
    own earlier tokens.
    """
    x = params.embed[batch.tokens].astype(params.unembed.dtype)  # [B, T, D]

    def dense_step(carry, layer):
        x, cache, i = carry
        x, cache = _attention(layer.attention, x, batch, cache, i, config)
        x = x + _rows(lambda r: shared_feed_forward(r, layer.feed_forward), x, layer.norm, config)
        return (x, cache, i + 1), None

    rows_of_tables, tables_of = tables.in_one_array()

    def sparse_step(carry, layer_and_tables):
        (x, cache, i), (layer, row_of_tables) = carry, layer_and_tables
        x, cache = _attention(layer.attention, x, batch, cache, i, config)
        rows = _rows(lambda r: r, x, layer.norm, config)
        moe_params = layer.moe
        if cache is not None:
            # Serving: kernels read the experts in the stack, out of which `scan` would copy them.
            # Without a cache it is training, whose gradients are less by slices than by stacks.
            stack = params.sparse.moe.experts
            index = i - config.num_dense_layers
            moe_params = moe_params._replace(experts=stack._replace(layer=index))
        output = moe_forward(
            moe_params,
            tables_of(row_of_tables),
            rows.reshape(-1, config.embed_dim),
            batch.valid.reshape(-1),
            config=moe,
            axis_name=axis_name,
        )
        x = x + output.tokens.reshape(x.shape)
        seen = (output.expert_tokens, output.rank_tokens, output.router_logits)
        return (x, cache, i + 1), seen

    carry = (x, cache, jnp.int32(0))
    if config.num_dense_layers:
        carry, _ = jax.lax.scan(dense_step, carry, params.dense)
    (x, cache, _), seen = jax.lax.scan(sparse_step, carry, (params.sparse, rows_of_tables))
    hidden = _rows(lambda r: r, x, params.norm, config)
    return DecoderOutput(hidden, cache, *seen)


def logits_of(hidden: Float[Array, "... D"], params: DecoderParams) -> Float[Array, "... V"]:
    """float32 logits of the next token."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = by_row_blocks(lambda r: (r @ params.unembed).astype(jnp.float32), flat)
    return out.reshape(*hidden.shape[:-1], -1)


def _rows(function, x: Float[Array, "B T D"], norm: Float[Array, "D"], config: DecoderConfig):
    """Normalise each token and apply a row-wise function to it."""
    flat = x.reshape(-1, x.shape[-1])
    out = by_row_blocks(lambda r: function(_rms_norm(r, norm, config.norm_epsilon)), flat)
    return out.reshape(*x.shape[:-1], -1)


def _rms_norm(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + jnp.float32(epsilon))
    return (normed * scale.astype(jnp.float32)[None]).astype(x.dtype)


def _attention(params, x, batch: Batch, cache: Cache | None, layer, config: DecoderConfig):
    """Causal self-attention with rotary positions; returns the new x and cache."""
    size, length, _ = x.shape
    qkv = _rows(lambda r: r @ params.query_key_value, x, params.norm, config)
    qkv = qkv.reshape(size, length, 3, config.num_heads, config.head_dim)
    query, key, value = jnp.unstack(qkv, axis=2)
    query = _rotate(query, batch.positions, config.rope_base)
    key = _rotate(key, batch.positions, config.rope_base)
    key_positions, key_written = batch.positions, batch.valid
    if cache is not None:
        capacity = cache.keys.shape[2]
        # A padding token is written past the end, that is, nowhere.
        at = jnp.where(batch.valid, batch.positions, capacity)
        keys = cache.keys.at[layer, batch.seats[:, None], at].set(key, mode="drop")
        values = cache.values.at[layer, batch.seats[:, None], at].set(value, mode="drop")
        cache = Cache(keys, values)
        key, value = keys[layer, batch.seats], values[layer, batch.seats]  # [B, C, H, head]
        key_positions = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (size, capacity))
        key_written = jnp.ones((size, capacity), bool)
    seen = key_positions[:, None, :] <= batch.positions[:, :, None]  # [B, T, keys]
    mask = (seen & key_written[:, None, :])[:, None]

    def attend(query, key, value, mask):
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    # One sequence at a time on CPU: no bit may depend on how many sequences a rank serves.
    mixed = by_row_blocks(attend, query, key, value, mask, block_rows=1)
    mixed = mixed.reshape(size * length, -1)
    out = by_row_blocks(lambda r: r @ params.out, mixed)
    return x + out.reshape(x.shape), cache


def _rotate(x: Float[Array, "B T H head"], positions: Int[Array, "B T"], base: float):
    """Rotary position embedding (Su et al., RoFormer, 2021), on halves."""
    half = x.shape[-1] // 2
    frequency = jnp.float32(base) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
