"""The MoE layer as a function of arrays: route, choose replicas, exchange, combine.

Runs inside `shard_map` over the axis that experts are spread on; a model calls it in its own
`shard_map`, the Flax module `MoE` wraps it in one. Axes: T tokens of this rank, D embedding
width, E experts, K choices per token, N slots per rank, R replicas at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels import by_row_blocks
from jax_eplb.load import count_experts
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.exchange import ExchangeGrid, exchange
from jax_eplb.moe.feed_forward import (
    ExpertWeights,
    SharedWeights,
    expert_feed_forward,
    shared_feed_forward,
)
from jax_eplb.routing import even, softmax_top_k


class MoEParams(NamedTuple):
    """This rank's parameters of one layer."""

    router: Float[Array, "D E"]  # float32
    experts: ExpertWeights  # by slot of this rank
    shared: SharedWeights | None = None


class LayerTables(NamedTuple):
    """One layer's replicas, as `Placement.tables` derives them; equal on every rank."""

    expert_to_slots: Int[Array, "E R"]
    replica_count: Int[Array, "E"]


class MoEOutput(NamedTuple):
    """The layer's result, and what it saw."""

    tokens: Float[Array, "T D"]
    expert_tokens: Int[Array, "E"]  # this rank's choices by expert, before replicas are chosen
    rank_tokens: Int[Array, ""]  # choices that this rank computed, whoever sent them
    router_logits: Float[Array, "T E"]


def moe_forward(
    params: MoEParams,
    tables: LayerTables,
    tokens: Float[Array, "T D"],
    mask: Bool[Array, "T"],
    *,
    config: MoEConfig,
    axis_name: str,
) -> MoEOutput:
    """One MoE layer on this rank's tokens, its experts spread over `axis_name`.

    Tokens with a False mask are padding: neither computed nor counted, their result is zero but
    for the shared expert. On one backend the result does not depend on the placement, nor on the
    number of ranks, bit for bit.
    """

    # The router decides by small differences: float32, whatever the activations are.
    def route(rows):
        logits = rows.astype(jnp.float32) @ params.router
        routes = softmax_top_k(logits, config.experts_per_token, renormalize=config.renormalize)
        return logits, routes

    logits, routes = by_row_blocks(route, tokens)
    expert_tokens = count_experts(routes.experts, config.num_experts, mask)
    slots = even(
        routes.experts,
        mask,
        tables.expert_to_slots,
        tables.replica_count,
        rank=jax.lax.axis_index(axis_name),
        num_slots=config.num_slots,
    )
    grid = ExchangeGrid(
        axis_name, config.num_ranks, config.slots_per_rank, config.wave_capacity(len(tokens))
    )
    compute = functools.partial(expert_feed_forward, kernel=config.kernel)
    results, rank_tokens = exchange(compute, grid, tokens, slots, params.experts)
    # Always in the order of the choices, wherever each was computed.
    weighted = results.astype(jnp.float32) * routes.weights[..., None]  # [T, K, D]
    combined = functools.reduce(jnp.add, jnp.unstack(weighted, axis=1)).astype(tokens.dtype)
    if params.shared is not None:
        combined = combined + shared_feed_forward(tokens, params.shared)
    return MoEOutput(combined, expert_tokens, rank_tokens, logits)
