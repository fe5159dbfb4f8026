"""Replica choice `balanced`: each batch divided so that the fullest rank is as light as possible.

Axes: P ranks, E experts, S slots, J slots of experts that have several.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.placement import PlacementTables
from jax_eplb.routing.balanced_kernel import MAX_REPLICATED_SLOTS, kernel_share
from jax_eplb.routing.leveling import NodeSupply, Supply, describe, own_share, whole_quota
from jax_eplb.routing.ranks import Ranks


def balanced(
    expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks
) -> Int[Array, "S"]:
    """How many of this rank's choices go to each slot; inside `shard_map` over the ranks.

    The ranks tell each other their counts, P·E integers. From these each one works out the same
    division and reads off its own part, so that no more needs to be said. Of all divisions of the
    batch the fullest rank of this one is the lightest, within about a thousandth of the mean or a
    token; and among the ways to fill it, tokens stay on their rank, or else on their node, as far
    as that costs no balance. The batch, of all ranks, must have fewer than 2^31 choices.

    The ranks agree because they run the same program on the same numbers: they must be devices of
    one kind.
    """
    counts = jax.lax.all_gather(expert_tokens, ranks.axis_name)  # [P, E]
    rank = jax.lax.axis_index(ranks.axis_name).astype(jnp.int32)
    return balanced_share(counts, tables, rank, ranks)


def balanced_share(
    counts: Int[Array, "P E"], tables: PlacementTables, rank: Int[Array, ""], ranks: Ranks
) -> Int[Array, "S"]:
    """The same from the counts of all ranks, for a given one.

    >>> from jax_eplb import Placement
    >>> tables = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2).tables()
    >>> tables = jax.tree.map(lambda table: table[0], tables)
    >>> counts, ranks = jnp.array([[4, 1, 1], [2, 0, 2]]), Ranks("expert", 2, 2)
    >>> [balanced_share(counts, tables, jnp.int32(rank), ranks).tolist() for rank in range(2)]
    [[4, 1, 1, 0], [0, 0, 2, 2]]
    """
    plain = functools.partial(plain_share, ranks=ranks)
    if not 0 < tables.replicated_slots.size <= MAX_REPLICATED_SLOTS:
        return plain(counts, tables, rank)
    kernel = functools.partial(kernel_share, ranks=ranks)
    return jax.lax.platform_dependent(counts, tables, rank, cuda=kernel, default=plain)


def plain_share(
    counts: Int[Array, "P E"], tables: PlacementTables, rank: Int[Array, ""], ranks: Ranks
) -> Int[Array, "S"]:
    """The same in plain JAX: elsewhere than on a GPU, and for very many replicas."""
    num_slots = tables.slot_to_expert.size
    expert_of_slot = tables.slot_to_expert
    own = counts[rank, expert_of_slot]
    if tables.replicated_slots.size == 0:
        return own

    slot = tables.replicated_slots
    used = slot < num_slots
    alone = -1 - jnp.arange(slot.size, dtype=jnp.int32)
    expert = jnp.where(used, expert_of_slot.at[slot].get(mode="clip"), alone)
    rank_of_slot = jnp.where(used, slot // ranks.slots_per_rank, alone)
    replicas = describe(expert, rank_of_slot)

    tokens = counts.sum(axis=0, dtype=jnp.int32)
    is_single = tables.replica_count[expert_of_slot] == 1
    fixed = jnp.where(is_single, tokens[expert_of_slot], 0)
    fixed = fixed.reshape(ranks.num_ranks, -1).sum(axis=1, dtype=jnp.int32)

    def of_expert(by_expert):
        return jnp.where(used, by_expert[jnp.maximum(expert, 0)], 0)

    def there(by_place, place):
        return jnp.where(used, by_place[jnp.maximum(place, 0), jnp.maximum(expert, 0)], 0)

    slot_fixed = jnp.where(used, fixed[jnp.maximum(rank_of_slot, 0)], 0)
    everything = tokens.sum(dtype=jnp.int32)
    mean = everything.astype(jnp.float32) / ranks.num_ranks
    quota = whole_quota(of_expert(tokens), slot_fixed, mean, tables.leveling, replicas)

    from_rank = jnp.arange(ranks.num_ranks, dtype=jnp.int32)[:, None]
    before = jnp.where(from_rank < rank, counts, 0)
    of_rank = {
        "own": of_expert(counts[rank]),
        "before": of_expert(before.sum(axis=0, dtype=jnp.int32)),
        "there": there(counts, rank_of_slot),
    }
    near = None
    if ranks.ranks_per_node is not None:
        per_node = ranks.ranks_per_node
        by_node = counts.reshape(-1, per_node, tokens.size).sum(axis=1, dtype=jnp.int32)
        near_before = jnp.where(from_rank // per_node == rank // per_node, before, 0)
        near = NodeSupply(
            node=jnp.where(used, rank_of_slot // per_node, alone),
            own_node=rank // per_node,
            before=of_expert(near_before.sum(axis=0, dtype=jnp.int32)),
            there=there(by_node, rank_of_slot // per_node),
        )
    share = own_share(quota, Supply(**of_rank), near, rank, replicas)
    return own.at[slot].set(share, mode="drop", unique_indices=True)
