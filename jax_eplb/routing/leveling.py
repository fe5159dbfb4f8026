"""The division of replicated experts' tokens that makes the fullest rank lightest.

Axes: J slots of experts that have several, as in `PlacementTables.replicated_slots`; what is no
slot has an expert and a rank of its own, and no tokens. Everything is a masked sum over J × J, so
that the same text is the body of a GPU kernel and, elsewhere, plain JAX.

Dividing so that the squared rank loads add up to the least also makes the largest least: what
loads the ranks can have is a base polytope. The splitting method (Douglas-Rachford) alternates
between the best division with any sign, a product with a matrix that depends on the placement
alone, and the nearest one without negative tokens, an absolute value: nothing is sorted, and a
step is one product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.placement import leveling_scale

# On recordings, 16 steps leave 0.001 of the mean on average, 24 steps 0.0004; rounding levels the
# rest, in so many rounds.
NUM_STEPS = 24
NUM_ROUNDS = 8
_RELAXATION = 1.6
_LEAST, _MOST = -(2**31), 2**31 - 1


class Replicas(NamedTuple):
    """The slots: number, expert and rank of each, and which pairs share the latter two."""

    index: Int[Array, "J"]
    expert: Int[Array, "J"]
    rank: Int[Array, "J"]
    same_expert: Bool[Array, "J J"]
    same_rank: Bool[Array, "J J"]


def describe(expert: Int[Array, "J"], rank: Int[Array, "J"]) -> Replicas:
    index = jnp.arange(expert.size, dtype=jnp.int32)
    same_expert = expert[:, None] == expert[None]
    return Replicas(index, expert, rank, same_expert, rank[:, None] == rank[None])


def total(mask: Bool[Array, "J J"], values: Array) -> Array:
    """For each slot, the sum over those that the mask joins it with."""
    zero = jnp.zeros((), values.dtype)
    return jnp.where(mask, values[:, None], zero).sum(axis=0, dtype=values.dtype)


def largest(mask: Bool[Array, "J J"], values: Int[Array, "J"]) -> Int[Array, "J"]:
    """The same for the maximum; the mask joins every slot with itself."""
    return jnp.where(mask, values[:, None], jnp.int32(_LEAST)).max(axis=0)


def transform(matrix: Float[Array, "J J"], vector: Float[Array, "J"]) -> Float[Array, "J"]:
    """The product with a symmetric matrix, in full float32 on any device."""
    return (matrix * vector[:, None]).sum(axis=0)


def whole_quota(
    tokens: Int[Array, "J"],  # of each slot's expert
    fixed: Int[Array, "J"],  # of each slot's rank, from experts that have one slot
    mean: Float[Array, ""],  # of the ranks' tokens
    leveling: Float[Array, "J J"],  # of `PlacementTables`
    replicas: Replicas,
) -> Int[Array, "J"]:
    """Whole tokens for each slot; those of an expert's slots add up to its tokens exactly."""
    unit = jnp.where(mean > 0, mean, 1.0)
    scaled = tokens.astype(jnp.float32) / unit, fixed.astype(jnp.float32) / unit
    slots = divide(*scaled, leveling, replicas)
    return round_off(slots * unit, tokens, fixed, mean.astype(jnp.int32), replicas)


def divide(
    tokens: Float[Array, "J"],  # of each slot's expert
    fixed: Float[Array, "J"],  # of each slot's rank, from experts that have one slot
    leveling: Float[Array, "J J"],
    replicas: Replicas,
    num_steps: int = NUM_STEPS,
) -> Float[Array, "J"]:
    """Tokens for each slot, fractions; an expert's add up but for rounding errors.

    Numbers should be of the order of one: in tokens of a mean rank, say.
    """
    one = jnp.ones_like(tokens)
    scale = leveling_scale(total(replicas.same_rank, one))
    even = tokens / total(replicas.same_expert, one)
    height = fixed + total(replicas.same_rank, even)
    start = even * scale

    middle = start - transform(leveling, start + height / scale)

    def step(_, state):
        best = middle + transform(leveling, jnp.abs(state))
        rest = (1 - _RELAXATION) * jnp.maximum(state, 0.0) + jnp.minimum(state, 0.0)
        return _RELAXATION * best + rest

    state = jax.lax.fori_loop(0, num_steps, step, start)
    slots = jnp.maximum(state, 0.0) / scale
    amount = total(replicas.same_expert, slots)
    some = amount > 0
    return jnp.where(some, slots * (tokens / jnp.where(some, amount, 1.0)), even)


def round_off(
    slots: Float[Array, "J"],  # in tokens
    tokens: Int[Array, "J"],
    fixed: Int[Array, "J"],
    mean: Int[Array, ""],  # of the ranks' tokens, about
    replicas: Replicas,
    num_rounds: int = NUM_ROUNDS,
) -> Int[Array, "J"]:
    """Whole tokens near the division; an expert's add up exactly, whatever was given.

    Rounded down, with each left-over token to its expert's least loaded slots; then so many rounds
    in which pairs of ranks level out.
    """
    index, same_expert, same_rank = replicas.index, replicas.same_expert, replicas.same_rank
    whole = jnp.clip(jnp.floor(slots + 1e-3).astype(jnp.int32), 0, tokens)
    left = tokens - total(same_expert, whole)
    key = _sort_key(fixed + total(same_rank, whole) - mean, index)
    lower = same_expert & (key[:, None] < key[None])
    place = lower.astype(jnp.int32).sum(axis=0, dtype=jnp.int32)
    whole = whole + (place < left).astype(jnp.int32)
    # Floats miss more than that among millions of tokens: the fullest slot makes it up.
    left = tokens - total(same_expert, whole)
    fullest = jnp.where(whole == largest(same_expert, whole), -index, -index.size)
    whole = whole + jnp.where(-index == largest(same_expert, fullest), left, 0)

    def level(_, state):
        whole, way_down = state
        height = fixed + total(same_rank, whole) - mean
        return _level_pairs(whole, height, way_down, replicas)

    unknown = jnp.maximum(whole, _MOST)  # inside `shard_map` it varies, as `whole` does
    return jax.lax.fori_loop(0, num_rounds, level, (whole, unknown))[0]


def _level_pairs(
    whole: Int[Array, "J"],
    height: Int[Array, "J"],  # of each slot's rank
    way_down: Int[Array, "J"],  # the lowest rank that it could shift to, as of the last round
    replicas: Replicas,
) -> tuple[Int[Array, "J"], Int[Array, "J"]]:
    """Each expert offers half the difference between its highest rank and its lowest.

    Of those that offer something to or from a rank, the one with the largest difference is heard;
    it shifts if both of its ranks hear it. So no rank gets more than was offered. A difference of
    one token is offered too, if the lower rank can shift it on to one that is lower still.
    """
    same_expert, same_rank = replicas.same_expert, replicas.same_rank
    bits = _bits(height.size)
    # The last bit of the sorted value tells which of two equal ranks has no way down.
    key = _sort_key(2 * height + (way_down >= height).astype(jnp.int32), replicas.index)
    highest = largest(same_expert, jnp.where(whole > 0, key, jnp.int32(_LEAST)))
    lowest = -largest(same_expert, -key)
    lowest_height, is_end = lowest >> (bits + 1), (lowest >> bits) & 1
    gap = (highest >> (bits + 1)) - lowest_height
    rank_of_gap = 2 * gap - is_end
    is_source = (key == highest) & (whole > 0) & (rank_of_gap > 1)
    is_target = (key == lowest) & (rank_of_gap > 1)
    # The place of its source tells experts with equal differences apart.
    bid = _sort_key(rank_of_gap, highest & ((1 << bits) - 1))
    bid = jnp.where(is_source | is_target, bid, -1)
    heard = bid == largest(same_rank, bid)
    offer = jnp.where(is_source & heard, jnp.minimum((gap + 1) >> 1, whole), 0)
    accepted = total(same_expert, (is_target & heard).astype(jnp.int32))
    shifted = total(same_expert, offer) * accepted
    shift = jnp.where(is_target, shifted, 0) - jnp.where(is_source, shifted, 0)
    way_down = -largest(same_rank, jnp.where(whole > 0, -lowest_height, jnp.int32(-_MOST)))
    return whole + shift, way_down


def _sort_key(value: Int[Array, "J"], index: Int[Array, "J"]) -> Int[Array, "J"]:
    """Sorts by value, then by index. Values of more than 2^30 / J (16 million for 64) are cut."""
    bits = _bits(index.size)
    bound = 1 << (30 - bits)
    return (jnp.clip(value, -bound, bound - 1) << bits) + index


def _bits(size: int) -> int:
    """Of an index below the size."""
    return max(size - 1, 0).bit_length()


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


def own_share(
    quota: Int[Array, "J"],
    supply: Supply,
    near: NodeSupply | None,
    rank: Int[Array, ""],
    replicas: Replicas,
) -> Int[Array, "J"]:
    """How many of a rank's tokens go to each slot, so that all ranks together fill the quotas.

    First to the own rank, as far as the quotas go, then to the own node, then to the rest. What is
    left of tokens and of quotas is laid side by side, both in the order of ranks, and each token
    goes to the quota beside it: every rank sees the same picture, and nobody has to ask another.
    """
    same_expert = replicas.same_expert
    earlier = replicas.index[:, None] < replicas.index[None]
    is_own, is_before = replicas.rank == rank, replicas.rank < rank

    same_place = same_expert & replicas.same_rank & earlier
    kept = jnp.clip(supply.there - total(same_place, quota), 0, quota)
    quota = quota - kept
    share = jnp.where(is_own, kept, 0)
    own = supply.own - total(same_expert, share)
    before = supply.before - total(same_expert, jnp.where(is_before, kept, 0))

    if near is not None:
        # Within each node: what its ranks have left beside what its slots have left.
        is_near = near.node == near.own_node
        same_node = same_expert & (near.node[:, None] == near.node[None])
        first = total(same_node & earlier, quota)
        taken = jnp.clip(near.there - total(same_node, kept) - first, 0, quota)
        near_quota = total(same_expert, jnp.where(is_near, quota, 0))
        near_kept = total(same_expert, jnp.where(is_near & is_before, kept, 0))
        near_before = near.before - near_kept
        share = share + jnp.where(is_near, _overlap(near_before, own, first, quota), 0)
        taken_before = total(same_expert, jnp.where(near.node < near.own_node, taken, 0))
        before = before - taken_before - jnp.minimum(near_before, near_quota)
        own = own - jnp.clip(near_quota - near_before, 0, own)
        quota = quota - taken

    first = total(same_expert & earlier, quota)
    return share + _overlap(before, own, first, quota)


def _overlap(start, length, other_start, other_length):
    """Of two intervals, in whole numbers."""
    end = jnp.minimum(start + length, other_start + other_length)
    return jnp.maximum(end - jnp.maximum(start, other_start), 0)
