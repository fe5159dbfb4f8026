"""Replica choice `even`: an expert's choices dealt over its replicas in turn.

Axes: E experts, S slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing.ranks import Ranks, SlotTokens
from jax_eplb.tables import PlacementTables


def even(expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks) -> SlotTokens:
    """How many choices go to each slot; inside `shard_map` over the ranks.

    The j-th choice of an expert on this rank goes to replica (j + rank) mod count. The offset by
    rank, which is TensorRT-LLM's, keeps the first replica from collecting every rank's remainder.
    """
    rank = jax.lax.axis_index(ranks.axis_name)
    return ranks.tell_all(even_share(expert_tokens, tables, rank))


def even_share(
    expert_tokens: Int[Array, "E"], tables: PlacementTables, rank: Int[Array, ""]
) -> Int[Array, "S"]:
    """How many of a given rank's choices go to each slot.

    >>> from jax_eplb import Placement
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> tables = placement.tables().of_layer(0)
    >>> even_share(jnp.array([5, 1, 3]), tables, jnp.int32(1)).tolist()
    [2, 1, 3, 3]
    """
    return deal(expert_tokens, tables, tables.replica_count, tables.replica_index, rank)


def deal(
    expert_tokens: Int[Array, "E"],
    tables: PlacementTables,
    count: Int[Array, "E"],  # of slots, among which each expert's choices are dealt
    turn: Int[Array, "S"],  # which of these each slot is
    rank: Int[Array, ""],
) -> Int[Array, "S"]:
    """Deal each expert's choices in turn over some of its slots; for slots with a turn among them.

    Empty slots get none.
    """
    tokens = expert_tokens.at[tables.slot_to_expert].get(mode="fill", fill_value=0)
    count = count.at[tables.slot_to_expert].get(mode="fill", fill_value=1)
    is_early = (turn - rank) % count < tokens % count
    return tokens // count + is_early.astype(jnp.int32)
