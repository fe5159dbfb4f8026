"""A rank's own part of a division of the batch, where tokens should stay near.

Axes: J slots of experts that have several, as in `leveling`. What is divided are the quotas of the
slots, whole tokens; which rank's tokens fill them costs no balance and can be chosen. Every rank
works out the same picture, and nobody has to ask another.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing.leveling import (
    Replicas,
    earlier_of_expert,
    mask_of,
    of_expert,
    overlap,
    total,
)


class Supply(NamedTuple):
    """Tokens of each slot's expert, by where they are."""

    own: Int[Array, "J"]  # on the rank whose share is asked for
    before: Int[Array, "J"]  # on all ranks before it
    there: Int[Array, "J"]  # on the slot's rank


class NodeSupply(NamedTuple):
    """The same for nodes, and each slot's node; what is no slot has a node of its own."""

    node: Int[Array, "J"]
    own_node: Int[Array, ""]  # of the rank whose share is asked for
    before: Int[Array, "J"]  # on the ranks before it on its node
    there: Int[Array, "J"]  # on the slot's node


def near_share(
    quota: Int[Array, "J"],
    supply: Supply,
    near: NodeSupply | None,
    rank: Int[Array, ""],
    replicas: Replicas,
) -> Int[Array, "J"]:
    """How many of a rank's tokens go to each slot, as near as the quotas allow.

    First to the own rank, as far as the quotas go, then to the own node, then to the rest. What is
    left of tokens and of quotas is laid side by side, both in the order of ranks.
    """
    earlier = earlier_of_expert(replicas)
    is_own, is_before = mask_of(replicas.rank == rank), mask_of(replicas.rank < rank)

    kept = jnp.clip(supply.there - total(earlier & replicas.same_rank, quota), 0, quota)
    quota = quota - kept
    share = is_own & kept
    own = supply.own - of_expert(replicas, share)
    before = supply.before - of_expert(replicas, is_before & kept)

    if near is not None:
        # Within each node: what its ranks have left beside what its slots have left.
        is_near = mask_of(near.node == near.own_node)
        same_node = mask_of(near.node[:, None] == near.node[None])
        first = total(earlier & same_node, quota)
        kept_there = total(replicas.same_expert & same_node, kept)
        taken = jnp.clip(near.there - kept_there - first, 0, quota)
        near_quota = of_expert(replicas, is_near & quota)
        near_before = near.before - of_expert(replicas, is_near & is_before & kept)
        share = share + (is_near & overlap(near_before, own, first, quota))
        taken_before = of_expert(replicas, mask_of(near.node < near.own_node) & taken)
        before = before - taken_before - jnp.minimum(near_before, near_quota)
        own = own - jnp.clip(near_quota - near_before, 0, own)
        quota = quota - taken

    first = total(earlier, quota)
    return share + overlap(before, own, first, quota)
