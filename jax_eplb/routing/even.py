"""Replica choice `even`: an expert's choices dealt over its replicas in turn.

Axes: E experts, S slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_eplb.routing.ranks import Ranks
from jax_eplb.tables import PlacementTables


def even(expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks) -> Int[Array, "S"]:
    """How many of this rank's choices go to each slot; inside `shard_map` over the ranks.

    The j-th choice of an expert on this rank goes to replica (j + rank) mod count. The offset by
    rank, which is TensorRT-LLM's, keeps the first replica from collecting every rank's remainder.
    """
    return even_share(expert_tokens, tables, jax.lax.axis_index(ranks.axis_name))


def even_share(
    expert_tokens: Int[Array, "E"], tables: PlacementTables, rank: Int[Array, ""]
) -> Int[Array, "S"]:
    """The same for a given rank.

    >>> from jax_eplb import Placement
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> tables = placement.tables().of_layer(0)
    >>> even_share(jnp.array([5, 1, 3]), tables, jnp.int32(1)).tolist()
    [2, 1, 3, 3]
    """
    return deal(expert_tokens, tables, jnp.ones(tables.slot_to_expert.size, bool), rank)


def deal(
    expert_tokens: Int[Array, "E"],
    tables: PlacementTables,
    eligible: Bool[Array, "S"],  # at least one slot of each expert
    rank: Int[Array, ""],
) -> Int[Array, "S"]:
    """Deal each expert's choices in turn over those of its slots that are eligible."""
    slots = tables.slots_by_expert
    expert = tables.slot_to_expert[slots]
    is_filled = expert < tables.replica_count.size
    takes = (eligible[slots] & is_filled).astype(jnp.int32)
    before = jnp.cumsum(takes, dtype=jnp.int32) - takes
    last = jnp.cumsum(tables.replica_count, dtype=jnp.int32)[expert] - 1
    first = last - tables.replica_count[expert] + 1
    count = before[last] + takes[last] - before[first]  # eligible slots of the expert
    turn = (before - before[first] - rank) % count
    tokens = expert_tokens[expert]
    share = tokens // count + (turn < tokens % count).astype(jnp.int32)
    return jnp.zeros_like(slots).at[slots].set(share * takes, unique_indices=True)
