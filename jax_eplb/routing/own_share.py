"""A rank's own part of a division of the batch, which every rank reads off for itself.

Axes: J slots of experts that have several, as in `leveling`. What is divided are the quotas of the
slots, whole tokens; which rank's tokens fill them costs no balance and can be chosen.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jax_eplb.routing.leveling import Replicas, mask_of, total

# Of each rank's tokens of an expert, where they are divided alike. With eight, what a rank sends
# another is on recordings within a few percent of what exact proportions would be.
BANDS = 8


def band_start(tokens: Int[Array, "..."], band: int) -> Int[Array, "..."]:
    """How many of the tokens are in bands before this one, of `BANDS` about equal ones.

    >>> [int(band_start(jnp.int32(11), band)) for band in (0, 1, 2, 7, 8)]
    [0, 1, 2, 9, 11]
    """
    # In two parts: the product with all tokens might not fit. No `//`, as they are not negative.
    number = jnp.int32(BANDS)
    return lax.div(tokens, number) * band + lax.div(lax.rem(tokens, number) * band, number)


def before_in_bands(
    tokens: Int[Array, "..."], is_before: Bool[Array, "..."]
) -> list[Int[Array, "..."]]:
    """For each band, those of a rank's tokens that come before a given rank's.

    `is_before`: whether the rank is, in the order of ranks; only then its own band counts, too.
    """
    starts = [band_start(tokens, band) for band in range(BANDS + 1)]
    return [jnp.where(is_before, end, start) for start, end in itertools.pairwise(starts)]


def before_each_rank(counts: Int[Array, "P E"]) -> Int[Array, "bands P E"]:
    """The same for every rank at once, on all ranks.

    >>> before_each_rank(jnp.array([[8], [16]]))[:2, :, 0].tolist()
    [[0, 1], [3, 4]]
    """
    starts = jnp.stack([band_start(counts, band) for band in range(BANDS + 1)])
    earlier = jnp.cumsum(starts, axis=1, dtype=jnp.int32) - starts  # on the ranks before
    return earlier[1:] + starts.sum(axis=1, keepdims=True, dtype=jnp.int32)[:-1] - earlier[:-1]


def alike_share(
    quota: Int[Array, "J"],
    own: Int[Array, "J"],  # tokens of each slot's expert, on the rank whose share is asked for
    before: Sequence[Int[Array, "J"]]
    | Int[Array, "bands J"],  # for each band, on all ranks, what comes before it
    replicas: Replicas,
) -> Int[Array, "J"]:
    """How many of a rank's tokens go to each slot, so that all ranks together fill the quotas.

    Each slot gets about the same part of every rank's tokens of its expert. The first band of all
    ranks, in their order, then the second of all, and so on, are laid beside the quotas, and each
    token goes to the quota beside it: every rank sees the same picture, and nobody has to ask
    another.
    """
    earlier = replicas.same_expert & mask_of(replicas.index[None] < replicas.index[:, None])
    first = total(earlier, quota)
    share = jnp.zeros_like(quota)
    for band in range(BANDS):
        start, end = band_start(own, band), band_start(own, band + 1)
        share = share + _overlap(before[band], end - start, first, quota)
    return share


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
    """The same, but tokens stay as near as the quotas allow.

    First to the own rank, as far as the quotas go, then to the own node, then to the rest. What is
    left of tokens and of quotas is laid side by side, both in the order of ranks.
    """
    same_expert = replicas.same_expert
    earlier = mask_of(replicas.index[None] < replicas.index[:, None])
    earlier_same_expert = same_expert & earlier
    is_own, is_before = mask_of(replicas.rank == rank), mask_of(replicas.rank < rank)

    same_place = earlier_same_expert & replicas.same_rank
    kept = jnp.clip(supply.there - total(same_place, quota), 0, quota)
    quota = quota - kept
    share = is_own & kept
    own = supply.own - total(same_expert, share)
    before = supply.before - total(same_expert, is_before & kept)

    if near is not None:
        # Within each node: what its ranks have left beside what its slots have left.
        is_near = mask_of(near.node == near.own_node)
        same_node = same_expert & mask_of(near.node[:, None] == near.node[None])
        first = total(same_node & earlier, quota)
        taken = jnp.clip(near.there - total(same_node, kept) - first, 0, quota)
        near_quota = total(same_expert, is_near & quota)
        near_before = near.before - total(same_expert, is_near & is_before & kept)
        share = share + (is_near & _overlap(near_before, own, first, quota))
        taken_before = total(same_expert, mask_of(near.node < near.own_node) & taken)
        before = before - taken_before - jnp.minimum(near_before, near_quota)
        own = own - jnp.clip(near_quota - near_before, 0, own)
        quota = quota - taken

    first = total(earlier_same_expert, quota)
    return share + _overlap(before, own, first, quota)


def _overlap(start, length, other_start, other_length):
    """Of two intervals, in whole numbers."""
    end = jnp.minimum(start + length, other_start + other_length)
    return jnp.maximum(end - jnp.maximum(start, other_start), 0)
