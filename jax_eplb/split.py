"""Split: how the tokens of a batch are divided among the replicas of their experts.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank; `...` leading axes, such as
the W windows of a recording.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jax_eplb.linear_algebra import exact_matmul
from jax_eplb.placement import Placement

# "balanced" is what layers with that replica choice do, "even" what others come to.
Split = Literal["even", "balanced"]


def even_split(
    load: Num[Array, "*windows L E"] | np.ndarray,
    slot_to_expert: Int[Array, "L S"] | np.ndarray,
    num_experts: int,
) -> Float[Array, "*windows L S"]:
    """Tokens of each slot where each expert's tokens are dealt evenly over its replicas.

    The result is float32: an expert's tokens need not be a multiple of its replicas. Slots that
    hold the id E are empty. Takes numpy counts of 64 bits too. Raises ValueError where the last two
    axes of `load` do not fit the table.

    >>> even_split(jnp.array([[6, 1, 2]]), jnp.array([[0, 1, 2, 0]]), 3).tolist()
    [[3.0, 1.0, 2.0, 3.0]]
    """
    _check_shape(load, slot_to_expert, num_experts)
    # Cast here: jit would wrap 64-bit counts around to 32 bits.
    return _even_split(jnp.asarray(load, jnp.float32), jnp.asarray(slot_to_expert, jnp.int32))


def rank_load(
    load: Num[Array, "*windows L E"] | np.ndarray, placement: Placement
) -> Float[Array, "*windows L P"]:
    """Tokens of each rank under `even_split`, float32.

    >>> placement = Placement.default(num_experts=3, num_slots=4, num_ranks=2)  # 0 1 | 1 2
    >>> rank_load(jnp.array([[6, 1, 2]]), placement).tolist()
    [[6.5, 2.5]]
    """
    tokens = even_split(load, placement.slot_to_expert, placement.num_experts)
    return sum_by_rank(tokens, placement.num_ranks)


def sum_by_rank(slot_tokens: Float[Array, "... S"], num_ranks: int) -> Float[Array, "... P"]:
    """Add up the slots of each rank.

    >>> sum_by_rank(jnp.array([3.0, 1.0, 2.0, 3.0]), 2).tolist()
    [4.0, 5.0]
    """
    return slot_tokens.reshape(*slot_tokens.shape[:-1], num_ranks, -1).sum(axis=-1)


def count_replicas(slot_to_expert: Int[Array, "L S"], num_experts: int) -> Int[Array, "L E"]:
    """How many slots hold each expert.

    >>> count_replicas(jnp.array([[0, 1, 2, 0]]), 3).tolist()
    [[2, 1, 1]]
    """
    return jax.vmap(lambda row: jnp.zeros(num_experts, jnp.int32).at[row].add(1))(slot_to_expert)


def slowness_of(capacity: Float[Array, "P"] | None, num_ranks: int) -> Float[Array, "P 1"]:
    """1 / capacity, 0 for a rank that holds nothing; ones without a capacity.

    Scaled so that the ranks' capacities add up to P: a height is then what a rank of average speed
    would need the same time for.

    >>> slowness_of(jnp.array([1.0, 1.0, 2.0, 0.0]), 4).ravel().tolist()
    [1.0, 1.0, 0.5, 0.0]
    """
    if capacity is None:
        return jnp.ones((num_ranks, 1), jnp.float32)
    capacity = jnp.asarray(capacity, jnp.float32)
    live = capacity > 0
    scaled = capacity * (num_ranks / jnp.maximum(capacity.sum(), 1e-30))
    return jnp.where(live, 1 / jnp.where(live, scaled, 1.0), 0.0)[:, None]


def _check_shape(load, slot_to_expert, num_experts: int) -> None:
    expected = (slot_to_expert.shape[0], num_experts)
    if load.shape[-2:] != expected:
        raise ValueError(
            f"load has shape {load.shape}; expected [..., {expected[0]} layers, "
            f"{expected[1]} experts], as in the placement"
        )


@jax.jit
def _even_split(
    load: Float[Array, "*windows L E"], slot_to_expert: Int[Array, "L S"]
) -> Float[Array, "*windows L S"]:
    count = jnp.maximum(count_replicas(slot_to_expert, load.shape[-1]), 1)
    share = load / jnp.broadcast_to(count.astype(jnp.float32), load.shape)

    def pick(share, slots):
        # The id E is an empty slot's.
        return share.at[..., slots].get(mode="fill", fill_value=0.0)

    return jax.vmap(pick, in_axes=(-2, 0), out_axes=-2)(share, slot_to_expert)


def balanced_split(
    load: Num[Array, "*windows L E"] | np.ndarray,
    slot_to_expert: Int[Array, "L S"] | np.ndarray,
    num_experts: int,
    num_ranks: int,
    *,
    capacity: Float[Array, "P"] | np.ndarray | None = None,
    num_steps: int = 40,
) -> Float[Array, "*windows L S"]:
    """Tokens of each slot where the fullest rank is as light as any division makes it.

    Each expert's tokens go to its replicas in whatever parts that takes. With `capacity`, the speed
    of each rank, it is tokens / capacity that counts; a rank of capacity 0 takes no tokens, and its
    slots may hold the id E. The result is float32, and stops `num_steps` short of the optimum: 40
    steps leave about a thousandth of the mean. Raises ValueError where the last two axes of `load`
    do not fit the table, or S is not divisible by P.

    >>> balanced_split(jnp.array([[6, 1, 3]]), jnp.array([[0, 1, 2, 0]]), 3, 2).round().tolist()
    [[4.0, 1.0, 3.0, 2.0]]
    """
    _check_shape(load, slot_to_expert, num_experts)
    num_slots = slot_to_expert.shape[1]
    if num_slots % num_ranks:
        raise ValueError(f"{num_slots} slots cannot be dealt evenly to {num_ranks} ranks")
    if capacity is None:
        capacity = jnp.ones(num_ranks, jnp.float32)
    return _balanced_split(
        jnp.asarray(load, jnp.float32),
        jnp.asarray(slot_to_expert, jnp.int32),
        jnp.asarray(capacity, jnp.float32),
        num_steps=num_steps,
    )


class Replicas(NamedTuple):
    """The slots of the experts that have several, J for each layer; the rest is masked."""

    slot: Int[Array, "L J"]
    expert: Int[Array, "L J"]  # position among the replicated experts, 0..X-1
    used: Float[Array, "L J 1"]  # 1, or 0 where there are fewer than J
    by_expert: Float[Array, "L X J"]  # 1 where a slot holds the expert
    by_rank: Float[Array, "L P J"]


@functools.partial(jax.jit, static_argnames=("num_steps",))
def _balanced_split(
    load: Float[Array, "*windows L E"],
    slot_to_expert: Int[Array, "L S"],
    capacity: Float[Array, "P"],
    *,
    num_steps: int,
) -> Float[Array, "*windows L S"]:
    num_layers, num_experts = load.shape[-2:]
    num_slots, num_ranks = slot_to_expert.shape[1], len(capacity)
    live = jnp.repeat(capacity > 0, num_slots // num_ranks)[None]
    slot_to_expert = jnp.where(live, slot_to_expert, num_experts)
    tokens = _even_split(load, slot_to_expert)
    if num_slots == num_experts or num_ranks == 1:
        return tokens
    # Windows last: long inner loops, and whole rows to gather.
    tokens = jnp.moveaxis(tokens.reshape(-1, num_layers, num_slots), 0, -1)  # [L, S, W]
    # Tokens of the mean rank, so that no step is lost to rounding; 1 where there are none.
    total = tokens.sum(axis=1, keepdims=True)
    unit = jnp.where(total > 0, total / num_ranks, 1.0)
    slowness = slowness_of(capacity, num_ranks)[:, 0]
    tokens = _level_out(tokens / unit, slot_to_expert, slowness, num_experts, num_steps) * unit
    return jnp.moveaxis(tokens, -1, 0).reshape(*load.shape[:-1], num_slots)


def _level_out(
    tokens: Float[Array, "L S W"],
    slot_to_expert: Int[Array, "L S"],
    slowness: Float[Array, "P"],
    num_experts: int,
    num_steps: int,
) -> Float[Array, "L S W"]:
    """Accelerated projected gradient on the sum of squared loads, all experts at once.

    The division with the least sum of squares (weighted with slowness) also has the lightest
    fullest rank: what loads the ranks can have is a base polytope.
    """
    num_slots = tokens.shape[1]
    num_ranks = len(slowness)
    few = gather_replicas(slot_to_expert, num_experts, num_ranks)
    rank = few.slot // (num_slots // num_ranks)
    here = jax.vmap(lambda table, ids: table[ids])
    start = here(tokens, few.slot) * few.used
    total = exact_matmul(few.by_expert, start)  # tokens of each replicated expert
    whole = sum_by_rank(jnp.swapaxes(tokens, 1, 2), num_ranks)
    fixed = jnp.swapaxes(whole, 1, 2) - exact_matmul(few.by_rank, start)
    # What one more token in every replicated slot of the rank would add to its height: a step that
    # is divided by the largest of these over the ranks of an expert cannot overshoot.
    crowd = (few.by_rank.sum(axis=-1) * slowness[None])[..., None]
    stiff = here(crowd, rank) * few.used
    stiff = (few.by_expert * jnp.swapaxes(stiff, 1, 2)).max(axis=2, keepdims=True)
    stiff = jnp.maximum(here(stiff, few.expert), 1e-6)  # [L, J, 1]

    def height_of(some):
        return (fixed + exact_matmul(few.by_rank, some)) * slowness[None, :, None]

    def nearest(wish):
        """Tokens nearest to the wish that are not negative and add up, for each expert."""
        # Newton steps from above to what each slot of an expert gives up: exact after very few.
        inside, some = few.used, wish
        for _ in range(3):
            excess = exact_matmul(few.by_expert, inside * wish) - total
            some = wish - here(
                excess / jnp.maximum(exact_matmul(few.by_expert, inside), 1.0), few.expert
            )
            inside = jnp.where(some > 0, few.used, 0.0)
        some = jnp.maximum(some, 0.0) * few.used
        amount = exact_matmul(few.by_expert, some)
        # A few tokens may be lost to rounding among very many.
        scale = jnp.where(amount > 0, total / jnp.where(amount > 0, amount, 1.0), 0.0)
        return jnp.where(here(amount, few.expert) > 0, some * here(scale, few.expert), start)

    def step(_, state):
        now, ahead, pace, best, lowest = state
        height = height_of(ahead)
        new = nearest(ahead - here(height, rank) / stiff)
        tallest = height_of(new).max(axis=1, keepdims=True)
        better = tallest < lowest
        uphill = (stiff * (ahead - new) * (new - now)).sum(axis=1, keepdims=True) > 0
        pace = jnp.where(uphill, 1.0, pace)
        next_pace = (1 + jnp.sqrt(1 + 4 * pace * pace)) / 2
        ahead = new + (pace - 1) / next_pace * (new - now)
        return new, ahead, next_pace, jnp.where(better, new, best), jnp.minimum(tallest, lowest)

    tallest = height_of(start).max(axis=1, keepdims=True)
    state = (start, start, jnp.ones_like(tallest), start, tallest)
    best = jax.lax.fori_loop(0, num_steps, step, state)[3]
    slots = jnp.where(few.used[..., 0] > 0, few.slot, num_slots)
    return jax.vmap(lambda table, ids, new: table.at[ids].set(new, mode="drop"))(
        tokens, slots, best
    )


def gather_replicas(
    slot_to_expert: Int[Array, "L S"], num_experts: int, num_ranks: int
) -> Replicas:
    num_slots = slot_to_expert.shape[1]
    # S - E further replicas are of at most S - E experts.
    most_experts = num_slots - num_experts
    most_slots = min(num_slots, 2 * most_experts)

    def one_layer(slots):
        count = jnp.zeros(num_experts, jnp.int32).at[slots].add(1, mode="drop")
        several = count > 1
        position = jnp.where(several, jnp.cumsum(several) - 1, most_experts).astype(jnp.int32)
        position = position.at[slots].get(mode="fill", fill_value=most_experts)
        place = jnp.where(position < most_experts, jnp.arange(num_slots), num_slots + 1)
        chosen = jnp.sort(place)[:most_slots].astype(jnp.int32)
        return jnp.minimum(chosen, num_slots - 1), position, chosen < num_slots

    slot, position, used = jax.vmap(one_layer)(slot_to_expert)
    expert = jnp.where(used, jnp.take_along_axis(position, slot, axis=1), 0)
    ids = jnp.arange(most_experts, dtype=jnp.int32)[None, :, None]
    by_expert = (expert[:, None] == ids) & used[:, None]
    ids = jnp.arange(num_ranks, dtype=jnp.int32)[None, :, None]
    by_rank = ((slot // (num_slots // num_ranks))[:, None] == ids) & used[:, None]
    used, by_expert, by_rank = (
        mask.astype(jnp.float32) for mask in (used[..., None], by_expert, by_rank)
    )
    return Replicas(slot, expert, used, by_expert, by_rank)
