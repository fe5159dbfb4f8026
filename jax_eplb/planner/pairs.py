"""Pairs: replica counts where a rank has two slots.

The best packing is then known: the largest replica with the smallest, the second largest with the
second smallest, and so on. What is left to choose is how many replicas each expert has, and one
more or less shifts all pairs, so changes that look at one rank (`refine`) get nowhere.

Axes: L layers, E experts, S slots, P = S / 2 ranks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Of the pairs' heights, in a norm so high that the tallest rule, and so low that others count.
_POWER = 1000


@functools.partial(jax.jit, static_argnames=("num_slots", "max_replicas", "num_tries", "least"))
def improve_pairs(
    load: Float[Array, "L E"],
    replica_count: Int[Array, "L E"],
    *,
    num_slots: int,
    max_replicas: int,
    num_tries: int,
    least: int = 1,
) -> Int[Array, "L E"]:
    """Move replicas from expert to expert, at random, and keep what makes the tallest pairs lower.

    No expert keeps fewer than `least`. The randomness is fixed: the same load gives the same counts
    everywhere.

    >>> load, count = jnp.array([[8.0, 4, 4]]), jnp.array([[1, 2, 1]])
    >>> sizes = dict(num_slots=4, max_replicas=2, num_tries=20)
    >>> improve_pairs(load, count, **sizes).tolist()
    [[2, 1, 1]]
    """
    num_experts = load.shape[1]
    load = load.astype(jnp.float32)
    mean = jnp.maximum(2 * load.sum(axis=1, keepdims=True) / num_slots, 1e-30)
    ids = jnp.arange(num_experts, dtype=jnp.int32)[None]

    def score(count):
        share = load / count.astype(jnp.float32) / mean
        repeat = functools.partial(jnp.repeat, total_repeat_length=num_slots)
        sizes = jnp.sort(jax.vmap(repeat)(share, count), axis=1)
        pairs = sizes[:, : num_slots // 2] + sizes[:, ::-1][:, : num_slots // 2]
        tallest = pairs.max(axis=1)
        ratio = pairs / jnp.maximum(tallest, 1e-30)[:, None]
        return tallest, tallest * (ratio**_POWER).sum(axis=1) ** (1 / _POWER)

    def pick(key, allowed):
        chance = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
        return chance.argmax(axis=1).astype(jnp.int32)[:, None]

    def attempt(i, state):
        count, tallest, best = state
        giver_key, taker_key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        # With one replica less, an expert must still be less than the tallest pair.
        left = load / jnp.maximum(count - 1, 1).astype(jnp.float32) / mean
        can_give = (count > least) & (left < tallest[:, None])
        giver = pick(giver_key, can_give)
        taker = pick(taker_key, count < max_replicas)
        step = (ids == taker).astype(jnp.int32) - (ids == giver).astype(jnp.int32)
        # Where no expert has a replica to give, nothing changes.
        step = jnp.where(can_give.any(axis=1, keepdims=True), step, 0)
        new_tallest, new = score(count + step)
        better = new < best
        return (
            jnp.where(better[:, None], count + step, count),
            jnp.where(better, new_tallest, tallest),
            jnp.where(better, new, best),
        )

    start = (replica_count, *score(replica_count))
    return jax.lax.fori_loop(0, num_tries, attempt, start)[0]
