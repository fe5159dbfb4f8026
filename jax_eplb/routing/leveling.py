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

from jax_eplb.tables import leveling_scale

# On recordings, 16 steps leave 0.001 of the mean on average, 24 steps 0.0004; rounding levels the
# rest, in so many rounds.
NUM_STEPS = 24
NUM_ROUNDS = 6
_RELAXATION = 1.6
_FAR = 2**31 - 1  # above any height


class Replicas(NamedTuple):
    """The slots: number, expert and rank of each, and which pairs share the latter two.

    The masks are -1 where a pair does and 0 elsewhere, to be combined with `&`: a GPU needs fewer
    instructions for that than for a choice.
    """

    index: Int[Array, "J"]
    rank: Int[Array, "J"]
    same_expert: Int[Array, "J J"]
    same_rank: Int[Array, "J J"]
    count: Int[Array, "J"]  # slots of the same expert
    # The first and the last of these, which stand side by side; where sums of whole tokens are to
    # be differences of running sums, which a GPU kernel cannot look up.
    ends: tuple[Int[Array, "J"], Int[Array, "J"]] | None = None


def describe(expert: Int[Array, "J"], rank: Int[Array, "J"]) -> Replicas:
    index = jnp.arange(expert.size, dtype=jnp.int32)
    same_expert = mask_of(expert[:, None] == expert[None])
    same_rank = mask_of(rank[:, None] == rank[None])
    count = total(same_expert, jnp.ones_like(index))
    return Replicas(index, rank, same_expert, same_rank, count)


def with_ends(replicas: Replicas) -> Replicas:
    """The same, so that `of_expert` takes J steps and not J²: for all ranks at once, say.

    >>> replicas = describe(jnp.array([3, 3, 5, 5, 5]), jnp.array([0, 1, 0, 1, 2]))
    >>> of_expert(with_ends(replicas), jnp.array([1, 2, 3, 4, 5])).tolist()
    [3, 3, 12, 12, 12]
    """
    first = replicas.index + earlier_of_expert(replicas).sum(axis=1, dtype=jnp.int32)
    return replicas._replace(ends=(first, first + replicas.count - 1))


def earlier_of_expert(replicas: Replicas) -> Int[Array, "J J"]:
    """The mask that joins each slot with those of its expert that come before it."""
    return replicas.same_expert & mask_of(replicas.index[None] < replicas.index[:, None])


def scale_of(replicas: Replicas) -> Float[Array, "J"]:
    """By which tokens of the slots are multiplied, and heights divided, for `leveling`."""
    crowd = total(replicas.same_rank, jnp.ones_like(replicas.index))
    return leveling_scale(crowd.astype(jnp.float32))


def of_expert(replicas: Replicas, tokens: Int[Array, "J"]) -> Int[Array, "J"]:
    """For each slot, the sum over the slots of its expert."""
    if replicas.ends is None:
        return total(replicas.same_expert, tokens)
    first, last = replicas.ends
    running = jnp.cumsum(tokens, dtype=jnp.int32)
    return running[last] - running[first] + tokens[first]


def mask_of(choice: Bool[Array, "..."]) -> Int[Array, "..."]:
    return -choice.astype(jnp.int32)


def total(mask: Int[Array, "J J"], values: Array) -> Array:
    """For each slot, the sum over those that the mask joins it with, in its row."""
    if values.dtype == jnp.int32:
        return (mask & values[None]).sum(axis=1, dtype=jnp.int32)
    return jnp.where(mask < 0, values[None], 0.0).sum(axis=1)


def largest(mask: Int[Array, "J J"], values: Int[Array, "J"]) -> Int[Array, "J"]:
    """The same for the largest of numbers that are not negative; 0 if it joins none."""
    return (mask & values[None]).max(axis=1)


def overlap(start, length, other_start, other_length):
    """Of two intervals, in whole numbers."""
    end = jnp.minimum(start + length, other_start + other_length)
    return jnp.maximum(end - jnp.maximum(start, other_start), 0)


def transform(matrix: Float[Array, "J J"], vector: Float[Array, "J"]) -> Float[Array, "J"]:
    """The product with a symmetric matrix, in full float32 on any device."""
    return (matrix * vector[None]).sum(axis=1)


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
    scale = scale_of(replicas)
    even = tokens / replicas.count.astype(jnp.float32)
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
    """Whole tokens near the division; an expert's add up exactly.

    Rounded down, with the left-over tokens to their expert's least loaded slots; then so many
    rounds in which pairs of ranks level out.
    """
    index, same_expert, same_rank = replicas.index, replicas.same_expert, replicas.same_rank
    # A little less, as far as floats may be wrong: what is left over must not be negative.
    whole = jnp.floor(slots * (1 - 2.0**-18) + 1e-3).astype(jnp.int32)
    left = tokens - total(same_expert, whole)
    bits, bound = _bits(index.size), 1 << (29 - _bits(index.size))

    def height_of(whole):
        # Not negative, so that it sorts; ranks 2^29 / J tokens off the mean count as equal.
        load = fixed + total(same_rank, whole)
        return jnp.clip(load - mean, -bound, bound - 1) + bound

    key = (height_of(whole) << bits) | index
    lower = same_expert & mask_of(key[None] < key[:, None])
    place = -lower.sum(axis=1, dtype=jnp.int32)
    each = jax.lax.div(left, replicas.count)
    whole = whole + each + (place < left - each * replicas.count).astype(jnp.int32)

    def level(_, state):
        whole, way_down = state
        return _shift_down(whole, height_of(whole), way_down, replicas)

    # Always as many: to find out whether a round changed anything takes a GPU as long as the round.
    unknown = jnp.maximum(whole, _FAR)  # inside `shard_map` it varies, as `whole` does
    return jax.lax.fori_loop(0, num_rounds, level, (whole, unknown))[0]


def _shift_down(
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
    has_some = mask_of(whole > 0)
    # By height; of equal ranks, those that have a way down count as lower.
    key = ((2 * height + (way_down >= height).astype(jnp.int32)) << bits) | replicas.index
    highest = largest(same_expert, has_some & key)
    lowest = _FAR - largest(same_expert, _FAR - key)
    lowest_height, is_end = lowest >> (bits + 1), (lowest >> bits) & 1
    gap = (highest >> (bits + 1)) - lowest_height
    gain = 2 * gap - is_end
    is_source = (key == (has_some & highest)) & (gain > 1)
    is_target = (key == lowest) & (gain > 1)
    # The place of its source tells experts with equal gains apart.
    bid = mask_of(is_source | is_target) & ((gain << bits) | (highest & ((1 << bits) - 1)))
    heard = bid == largest(same_rank, bid)
    # One sum for both: the source's offer, doubled, and whether the target takes it.
    offer = mask_of(is_source & heard) & (2 * jnp.minimum(jnp.maximum(gap >> 1, 1), whole))
    deal = total(same_expert, offer | (is_target & heard).astype(jnp.int32))
    shifted = (deal >> 1) * (deal & 1)
    shift = (mask_of(is_target) & shifted) - (mask_of(is_source) & shifted)
    way_down = _FAR - largest(same_rank, has_some & (_FAR - lowest_height))
    return whole + shift, way_down


def _bits(size: int) -> int:
    """Of an index below the size."""
    return max(size - 1, 0).bit_length()
