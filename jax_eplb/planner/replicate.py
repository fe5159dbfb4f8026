"""Replicate: how many slots each expert gets.

Axes: L layers, E experts, S slots, R replicas of an expert at most.

Within the planner's loops the layers are the last axis. One step touches few numbers of a layer and
the same ones of every layer, so this keeps the inner loops long: several times faster on a CPU than
`vmap`, which puts the layers first.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("num_slots", "max_replicas", "least"))
def replicate(
    load: Float[Array, "L E"],
    num_slots: int,
    max_replicas: int | None = None,
    offset: Float[Array, ""] | float = 0.0,
    held_back: Int[Array, ""] | int = 0,
    live: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    least: int = 1,
) -> Int[Array, "L E"]:
    """Give each spare slot to the expert with the largest load / (replicas + offset).

    With offset 0, the greedy of DeepSeek's EPLB, no other replication has a smaller largest
    replica. A negative offset, above -1, leaves the hottest experts larger replicas and splits more
    of the middling ones, which packs better where a few experts carry most of the load. (These are
    the divisor rules by which seats are dealt to parties.) Ties go to the lowest id; experts
    without load come last, and among them the one with the fewest replicas.

    The last `held_back` spare slots go to the experts with the smallest replicas instead: where a
    further replica of a hot expert would only meet another hot one, an all but empty slot is worth
    more. Every expert gets at least `least` replicas, and at most `max_replicas`; by default only
    the other experts' need of a slot bounds them. `live`: the slots to give out and the ranks they
    are on, where some ranks hold nothing; where they are too few for `least`, it is 1. Raises
    ValueError where S slots cannot be given out so.

    >>> replicate(jnp.array([[10.0, 5, 2, 15, 8]]), 9).tolist()
    [[2, 1, 1, 3, 2]]
    """
    num_layers, num_experts = load.shape
    bound = num_slots - num_experts + 1 if max_replicas is None else max_replicas
    if not num_experts * least <= num_slots <= num_experts * bound:
        raise ValueError(
            f"{num_slots} slots for {num_experts} experts of {least} to {bound} replicas; "
            f"use {num_experts * least} to {num_experts * bound} slots"
        )
    slots, first = num_slots, least
    if live is not None:
        slots, ranks = live
        bound = jnp.minimum(ranks, bound)
        first = jnp.where(slots < least * num_experts, 1, first)
    spare = slots - first * num_experts
    load = load.astype(jnp.float32).T  # [E, L]
    ids = jnp.arange(num_experts, dtype=jnp.int32)[:, None]

    def give(i, replicas):
        count = replicas.astype(jnp.float32)
        hottest = jnp.where(load > 0, load / (count + offset), -count)
        claim = jnp.where(i < spare - held_back, hottest, -load / count)
        claim = jnp.where(replicas < bound, claim, -jnp.inf)
        strongest = claim.max(axis=0, keepdims=True)
        winner = jnp.where(claim == strongest, ids, num_experts).min(axis=0, keepdims=True)
        return replicas + (ids == winner).astype(jnp.int32)

    start = jnp.full((num_experts, num_layers), first, jnp.int32)
    return jax.lax.fori_loop(0, spare, give, start).T
