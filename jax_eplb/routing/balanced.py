"""Replica choice `balanced`: each batch divided so that the fullest rank is as light as possible.

Axes: P ranks, E experts, S slots, J slots of experts that have several.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing.balanced_kernel import fits, kernel_shares
from jax_eplb.routing.leveling import describe, whole_quota, with_ends
from jax_eplb.routing.near_share import NodeSupply, Supply, near_share
from jax_eplb.routing.pair_shares import level_pairs, whole_share
from jax_eplb.routing.ranks import Ranks, SlotTokens
from jax_eplb.tables import PlacementTables


def balanced(expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks) -> SlotTokens:
    """How many choices go to each slot; inside `shard_map` over the ranks.

    The ranks tell each other their counts, P·E integers. From these each one works out the same
    division and reads off all ranks' parts, so that no more needs to be said. Of all divisions of
    the batch the fullest rank of this one is the lightest, within about a thousandth of the mean or
    a token. Among the ways to fill it, one is taken in which every rank sends every other about as
    much, so that small buffers do; or, where `ranks.prefers_near`, tokens stay on their rank, or
    else on their node, as far as that costs no balance. A slower rank counts as fuller by the
    tables' `handicap`. The batch, of all ranks, must have fewer than 2^31 choices.

    The ranks agree because they run the same program on the same numbers, on devices of one kind.
    Were their floats to differ, a rank would send a few tokens elsewhere than the others expect,
    and none would be lost.
    """
    return ranks.known_to_all(balanced_shares(ranks.gather(expert_tokens), tables, ranks))


def balanced_shares(
    counts: Int[Array, "P E"], tables: PlacementTables, ranks: Ranks
) -> Int[Array, "P S"]:
    """Each rank's choices for each slot, from the counts of all ranks.

    >>> from jax_eplb import Placement
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> tables = placement.tables(with_leveling=True).of_layer(0)
    >>> counts, ranks = jnp.array([[4, 1, 1], [2, 0, 2]]), Ranks("expert", 2, 2)
    >>> jax.jit(balanced_shares, static_argnames="ranks")(counts, tables, ranks=ranks).tolist()
    [[3, 1, 1, 1], [1, 0, 2, 1]]
    """
    if len(tables.leveling) != len(tables.replicated_slots):
        raise ValueError(
            "the tables were derived without what replica choice 'balanced' needs; use "
            "placement.tables(with_leveling=True)"
        )
    plain = functools.partial(plain_shares, ranks=ranks)
    if not fits(ranks, tables.replicated_slots.size):
        return plain(counts, tables)
    kernel = functools.partial(kernel_shares, ranks=ranks)
    return jax.lax.platform_dependent(counts, tables, cuda=kernel, default=plain)


def plain_shares(
    counts: Int[Array, "P E"], tables: PlacementTables, ranks: Ranks
) -> Int[Array, "P S"]:
    """The same in plain JAX: elsewhere than on an NVIDIA GPU, and for very many replicas."""
    slot, slot_to_expert = tables.replicated_slots, tables.slot_to_expert
    # Right for the slots of experts that have no other, and for empty ones.
    shares = counts.at[:, slot_to_expert].get(mode="fill", fill_value=0)
    if slot.size == 0:
        return shares

    used = slot < slot_to_expert.size
    alone = -1 - jnp.arange(slot.size, dtype=jnp.int32)
    expert = jnp.where(used, slot_to_expert.at[slot].get(mode="clip"), alone)
    rank_of_slot = jnp.where(used, slot // ranks.slots_per_rank, alone)
    replicas = with_ends(describe(expert, rank_of_slot))

    def pick(table, *index):
        """An entry for each slot, 0 for what is none."""
        return jnp.where(used, table[..., *(jnp.maximum(i, 0) for i in index)], 0)

    tokens = counts.sum(axis=0, dtype=jnp.int32)
    num_replicas = tables.replica_count.at[slot_to_expert].get(mode="fill", fill_value=0)
    of_single = jnp.where(num_replicas == 1, shares, 0)
    fixed = of_single.sum(axis=0, dtype=jnp.int32)
    fixed = fixed.reshape(ranks.num_ranks, -1).sum(axis=1, dtype=jnp.int32)
    mean = tokens.sum(dtype=jnp.int32).astype(jnp.float32) / ranks.num_ranks
    fixed = fixed + (tables.handicap * mean).astype(jnp.int32)
    slot_tokens, slot_fixed = pick(tokens, expert), pick(fixed, rank_of_slot)
    quota = whole_quota(slot_tokens, slot_fixed, mean, tables.leveling, replicas)

    own = pick(counts, expert)  # [P, J]
    if not ranks.prefers_near:
        pairs = of_single.reshape(len(counts), ranks.num_ranks, -1).sum(axis=2)
        pairs = pick(pairs.astype(jnp.float32), rank_of_slot)
        level = level_pairs(
            quota, slot_tokens, own, pairs, ranks.num_ranks, tables.leveling, replicas
        )
        share = jnp.floor(level).astype(jnp.int32)
        quota_left = quota - share.sum(axis=0, dtype=jnp.int32)
        read_off = jax.vmap(whole_share, in_axes=(0, 0, 0, 0, None, None))
        found = read_off(share, _before(share), own, _before(own), quota_left, replicas)
        return _with_replicated(shares, slot, found)

    def near_of(rank, own):
        before, near_before, on_nodes = _nearness(counts, rank, ranks)
        supply = Supply(own, pick(before, expert), there=pick(counts, rank_of_slot, expert))
        near = None
        if ranks.ranks_per_node is not None:
            per_node = ranks.ranks_per_node
            node = jnp.where(used, rank_of_slot // per_node, alone)
            there = pick(on_nodes, node, expert)
            near = NodeSupply(node, rank // per_node, pick(near_before, expert), there)
        return near_share(quota, supply, near, rank, replicas)

    each = jnp.arange(len(counts), dtype=jnp.int32)
    return _with_replicated(shares, slot, jax.vmap(near_of)(each, own))


def _before(tokens: Int[Array, "P J"]) -> Int[Array, "P J"]:
    """On all ranks before each one."""
    return jnp.cumsum(tokens, axis=0, dtype=jnp.int32) - tokens


def _with_replicated(shares, slot: Int[Array, "J"], replicated: Int[Array, "P J"]):
    return shares.at[:, slot].set(replicated, mode="drop", unique_indices=True)


def _nearness(
    counts: Int[Array, "P E"], rank: Int[Array, ""], ranks: Ranks
) -> tuple[Int[Array, "E"], Int[Array, "E"], Int[Array, "Q E"]]:
    """Tokens of each expert: on the ranks before, on those on its node among them, on each node."""
    per_node = ranks.ranks_per_node or ranks.num_ranks
    number = jnp.arange(len(counts), dtype=jnp.int32)[:, None]
    before = jnp.where(number < rank, counts, 0)
    near_before = jnp.where(number // per_node == rank // per_node, before, 0)
    on_nodes = counts.reshape(-1, per_node, counts.shape[1])
    return (
        before.sum(axis=0, dtype=jnp.int32),
        near_before.sum(axis=0, dtype=jnp.int32),
        on_nodes.sum(axis=1, dtype=jnp.int32),
    )
