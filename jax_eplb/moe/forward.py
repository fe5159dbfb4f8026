"""The MoE layer as a function of arrays: route, choose replicas, exchange, combine.

Runs inside `shard_map` over the axis that experts are spread on; a model calls it in its own
`shard_map`, the Flax module `MoE` wraps it in one. Axes: T tokens of this rank, D embedding
width, E experts, K choices per token, N slots per rank, S slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels import logits
from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.exchange import exchange
from jax_eplb.moe.feed_forward import (
    ExpertWeights,
    SharedWeights,
    expert_feed_forward,
    shared_feed_forward,
)
from jax_eplb.routing import order_by_slot, order_without_replicas, route_and_sort
from jax_eplb.tables import PlacementTables


class MoEParams(NamedTuple):
    """This rank's parameters of one layer."""

    router: Float[Array, "D E"]  # float32
    experts: ExpertWeights  # by slot of this rank
    shared: SharedWeights | None = None
    router_bias: Float[Array, "E"] | None = None  # of the logits (gpt-oss)
    selection_bias: Float[Array, "E"] | None = None  # chooses, but does not weigh (DeepSeek-V3)


class MoEOutput(NamedTuple):
    """The layer's result, and what it saw."""

    tokens: Float[Array, "T D"]
    expert_tokens: Int[Array, "E"]  # this rank's choices by expert, before replicas are chosen
    rank_tokens: Int[Array, ""]  # choices that this rank computed, whoever sent them
    router_logits: Float[Array, "T E"]


@functools.partial(jax.jit, static_argnames=("config", "axis_name", "tensor_axis"))
def moe_forward(
    params: MoEParams,
    tables: PlacementTables,  # of one layer
    tokens: Float[Array, "T D"],
    mask: Bool[Array, "T"],
    *,
    config: MoEConfig,
    axis_name: str = "expert",
    tensor_axis: str | None = None,
) -> MoEOutput:
    """One MoE layer on this rank's tokens, its experts spread over `axis_name`.

    Tokens with a False mask are padding: neither computed nor counted, their result is zero but
    for the shared expert. On one backend the result does not depend on the placement, nor on the
    number of ranks, bit for bit.
    A slot's weights get the gradient of the choices that it served; `tie_replicas` makes that of
    all of its expert's, so that replicas stay equal under any optimizer.

    With `tensor_axis`, the experts' hidden width is spread over that axis, which sees the same
    tokens; the shared expert's, too.

    Under `jit`, so that layers which a model calls one after the other are traced once, and their
    kernels compiled once.
    """
    router_logits = logits(tokens, params.router)
    if params.router_bias is not None:
        router_logits = router_logits + params.router_bias[None]
    ranks, sizes = config.ranks(axis_name), config.exchange_sizes(len(tokens))
    one_slot_each = config.num_slots == config.num_experts
    routes, found = route_and_sort(
        router_logits,
        mask,
        config.experts_per_token,
        config.router,
        params.selection_bias,
        tables.first_slot if one_slot_each else None,
    )
    # The counts are a part of the sort that the experts need: counting the load costs nothing.
    expert_tokens = found.expert_tokens
    if one_slot_each:
        order = order_without_replicas(found, ranks)
    else:
        among = ranks._replace(prefers_near=not sizes.fit_the_fullest_pair)
        slot_tokens = config.policy(len(tokens))(expert_tokens, tables, among)
        order = order_by_slot(found, slot_tokens, tables)

    experts = _flat(params.experts)
    if tensor_axis is not None and experts.down_bias is not None:
        is_first = jax.lax.axis_index(tensor_axis) == 0  # added once, not by each part of F
        experts = experts._replace(down_bias=jnp.where(is_first, experts.down_bias, 0))
    compute = functools.partial(
        expert_feed_forward, activation=config.activation, kernel=config.kernel
    )
    combined, rank_tokens = exchange(compute, sizes, ranks, tokens, routes.weights, order, experts)
    if params.shared is not None:
        shared = shared_feed_forward(tokens, params.shared, activation=config.activation)
        combined = combined + shared.astype(jnp.float32)
    if tensor_axis is not None:
        combined = jax.lax.psum(combined, tensor_axis)
        # The same on all of them: their mean. (A maximum has no derivative rule.)
        rank_tokens = jax.lax.psum(rank_tokens, tensor_axis) // jax.lax.axis_size(tensor_axis)
    # To the digits of the type, in any program: else XLA may leave them to what follows.
    kept = jnp.finfo(tokens.dtype)
    combined = jax.lax.reduce_precision(combined, kept.nexp, kept.nmant).astype(tokens.dtype)
    return MoEOutput(combined, expert_tokens, rank_tokens, router_logits)


def _flat(experts: ExpertWeights) -> ExpertWeights:
    """Gate and up side by side: [N, D, 2, F] is as good as [N, D, 2F]."""
    *slots, _, embed_dim = experts.down.shape  # [N], or [L, N] of a stack
    bias = experts.gate_up_bias
    return experts._replace(
        gate_up=experts.gate_up.reshape(*slots, embed_dim, -1),
        gate_up_bias=None if bias is None else bias.reshape(*slots, -1),
    )
