"""Which ranks' tokens fill the quotas, so that every rank sends every other about as much.

Axes: P ranks, J slots of experts that have several, as in `leveling`. What one rank sends another
travels in buffers of one size, so the fullest pair of ranks decides how large they are. Levelling
the pairs is levelling each rank's own tokens by the matrix that levels all of them. As the shifts
of all ranks add up to none, the quotas stay filled.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.routing.leveling import (
    Replicas,
    earlier_of_expert,
    of_expert,
    overlap,
    scale_of,
    total,
)

# On recordings, each rank with text of its own, the fullest pair is then 2% above what the fullest
# rank asks for on 4 ranks, and up to 9% on 8. Without a round it is up to 9% and 20%.
NUM_PAIR_ROUNDS = 3


def level_pairs(
    quota: Int[Array, "J"],
    tokens: Int[Array, "J"],  # of each slot's expert, on all ranks
    own: Int[Array, "P J"],  # of each slot's expert, on each rank
    fixed: Float[Array, "P J"],  # what each rank sends the slot's rank, of experts with one slot
    num_ranks: int,  # P, or fewer where the last rows are padding, all 0
    leveling: Float[Array, "J J"],  # of `PlacementTables`
    replicas: Replicas,
) -> Float[Array, "P J"]:
    """What each rank sends to each slot, fractions, never more than its tokens or the quota.

    From the same part of every rank's tokens on, rounds in which each rank's own loads of the
    others are levelled as far as no share gets negative.
    """
    scale = scale_of(replicas)[None]
    exists = jax.lax.broadcasted_iota(jnp.int32, own.shape, 0) < num_ranks
    amount = quota.astype(jnp.float32)[None]

    def shifts(uneven):
        """What levels the loads of a slot's rank, which are as far from the ranks' mean."""
        return -jnp.dot(uneven / scale, leveling) / scale

    from_fixed = shifts(
        jnp.where(exists, fixed - fixed.sum(axis=0, keepdims=True) / num_ranks, 0.0)
    )
    from_shares = shifts(_as_float(replicas.same_rank))

    def level(_, shares):
        uneven = jnp.where(exists, shares - amount / num_ranks, 0.0)
        shift = from_fixed + jnp.dot(uneven, from_shares)
        # One step for all slots of an expert and all ranks: else the sums would change.
        enough = jnp.where(shift < 0, shares / jnp.maximum(-shift, 1e-30), 1.0)
        step = jnp.minimum(enough.min(axis=0), 1.0)
        step = jnp.where(replicas.same_expert < 0, step[None], 1.0).min(axis=1)
        return jnp.maximum(shares + step[None] * shift, 0.0)

    own_amount = own.astype(jnp.float32)
    shares = own_amount * (amount / jnp.maximum(tokens, 1).astype(jnp.float32)[None])
    shares = jax.lax.fori_loop(0, NUM_PAIR_ROUNDS, level, shares)
    # On a GPU the products above are of rounded numbers, and so is this one.
    sums = jnp.dot(shares, _as_float(replicas.same_expert)) * (1 + 2.0**-9)
    shares = shares * jnp.minimum(own_amount / jnp.maximum(sums, 1e-30), 1.0)
    sums = shares.sum(axis=0, keepdims=True) * (1 + 2.0**-16)
    return shares * jnp.minimum(amount / jnp.maximum(sums, 1e-30), 1.0)


def whole_share(
    share: Int[Array, "J"],  # of a rank, of `level_pairs`, rounded down
    share_before: Int[Array, "J"],  # of all ranks before it
    own: Int[Array, "J"],  # its tokens of each slot's expert
    before: Int[Array, "J"],  # those of all ranks before it
    quota_left: Int[Array, "J"],  # by all ranks' shares
    replicas: Replicas,
) -> Int[Array, "J"]:
    """How many of a rank's tokens go to each slot, so that all ranks together fill the quotas.

    What is left of tokens, in the order of ranks, and of quotas is laid side by side, and each
    token goes to the quota beside it. Every rank sees the same picture, and nobody has to ask
    another.
    """
    first = total(earlier_of_expert(replicas), quota_left)
    left = own - of_expert(replicas, share)
    left_before = before - of_expert(replicas, share_before)
    return share + overlap(left_before, left, first, quota_left)


def _as_float(mask: Int[Array, "J J"]) -> Float[Array, "J J"]:
    return -mask.astype(jnp.float32)
