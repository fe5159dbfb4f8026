"""Replica choice `local`: the nearest replica of an expert, as far as it has one nearby.

Axes: E experts, S slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing.even import deal
from jax_eplb.routing.ranks import Ranks, SlotTokens
from jax_eplb.tables import PlacementTables


def local(expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks) -> SlotTokens:
    """How many choices go to each slot; inside `shard_map` over the ranks.

    All of an expert's choices go to its replica on this rank, else to those on this node, else to
    all of them; in turn, as `even` deals them, where that leaves several.
    """
    rank = jax.lax.axis_index(ranks.axis_name)
    return ranks.tell_all(local_share(expert_tokens, tables, rank, ranks))


def local_share(
    expert_tokens: Int[Array, "E"], tables: PlacementTables, rank: Int[Array, ""], ranks: Ranks
) -> Int[Array, "S"]:
    """How many of a given rank's choices go to each slot.

    >>> from jax_eplb import Placement
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> tables = placement.tables().of_layer(0)
    >>> local_share(jnp.array([5, 1, 3]), tables, jnp.int32(1), Ranks("expert", 2, 2)).tolist()
    [0, 1, 3, 5]
    """
    num_experts, num_slots = tables.replica_count.size, tables.slot_to_expert.size
    rank_of_slot = jnp.arange(num_slots, dtype=jnp.int32) // ranks.slots_per_rank
    nearness = (rank_of_slot == rank).astype(jnp.int32)
    if ranks.ranks_per_node is not None:
        same_node = rank_of_slot // ranks.ranks_per_node == rank // ranks.ranks_per_node
        nearness = nearness + same_node.astype(jnp.int32)
    nearest = jnp.zeros(num_experts, jnp.int32).at[tables.slot_to_expert].max(nearness)
    eligible = nearness == nearest[tables.slot_to_expert]
    # By expert: which of the eligible slots of the same expert each is.
    ordered = eligible[tables.slots_by_expert].astype(jnp.int32)
    before = jnp.cumsum(ordered, dtype=jnp.int32) - ordered
    first = jnp.cumsum(tables.replica_count, dtype=jnp.int32) - tables.replica_count
    expert = tables.slot_to_expert[tables.slots_by_expert]
    turn = before - before[first.at[expert].get(mode="clip")]
    turn = jnp.zeros_like(turn).at[tables.slots_by_expert].set(turn, unique_indices=True)
    count = jnp.zeros(num_experts, jnp.int32)
    count = count.at[tables.slot_to_expert].add(eligible.astype(jnp.int32), mode="drop")
    return jnp.where(eligible, deal(expert_tokens, tables, count, turn, rank), 0)
