"""Replica choice: which slot of its expert serves each choice of a token.

Axes: T tokens of this rank, K choices per token, E experts, S slots, R replicas at most.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_eplb.routing.occurrence import occurrence


def even(
    experts: Int[Array, "T K"],
    mask: Bool[Array, "T"],
    expert_to_slots: Int[Array, "E R"],  # S past an expert's last replica
    replica_count: Int[Array, "E"],
    *,
    rank: Int[Array, ""],
    num_slots: int,
) -> Int[Array, "T K"]:
    """Deal each expert's choices over its replicas in turn; S for padding tokens.

    The j-th choice of an expert on this rank goes to replica (j + rank) mod count. The offset by
    rank, which is TensorRT-LLM's, keeps the first replica from collecting every rank's remainder.

    >>> tables = jnp.array([[0, 3], [1, 4], [2, 4]]), jnp.array([2, 1, 1])
    >>> tokens = jnp.array([[0], [0], [1], [0]])
    >>> even(tokens, jnp.ones(4, bool), *tables, rank=jnp.int32(0), num_slots=4).tolist()
    [[0], [3], [1], [0]]
    """
    num_experts = replica_count.shape[0]
    counted = jnp.where(mask[:, None], experts, num_experts)
    nth = occurrence(counted.reshape(-1), num_experts + 1).reshape(experts.shape)
    replica = (nth + rank) % replica_count[experts]
    return jnp.where(mask[:, None], expert_to_slots[experts, replica], num_slots)
