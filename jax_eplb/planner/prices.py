"""Prices: what a swap or a replacement promises under the balanced split, for all of them at once.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank, J slots of experts with
several replicas, H hot experts, C candidates, W scenarios.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_TEMPERATURE = 0.03
_HOT = 32
_FAR = 1e9


class Changes(NamedTuple):
    """Changes, the most promising first."""

    here: Int[Array, "L C"]  # slot
    there: Int[Array, "L C"]  # the slot to swap with; -1 for a replacement
    newcomer: Int[Array, "L C"]  # the expert that replaces the one here
    possible: Bool[Array, "L C"]


def promising_changes(
    slots: Int[Array, "L S"],
    holds: Float[Array, "L E+1 P"],
    load: Float[Array, "L E+1 W"],
    height: Float[Array, "L P W"],
    slowness: Float[Array, "P 1"],
    num_changes: int,
) -> Changes:
    """The swaps and replacements that lower the fullest rank most, to first order.

    An expert's tokens go where the price is lowest: the value of its ranks is that lowest price.
    """
    num_slots = slots.shape[1]
    num_ranks = len(slowness)
    most_slots = min(num_slots, 2 * max(num_slots - holds.shape[1] + 1, 1))
    price = jax.nn.softmax(height / _TEMPERATURE, axis=1) * slowness[None]
    price = price / price.shape[2]

    def one_layer(slots, holds, load, price):
        num_experts = len(load) - 1
        rank = jnp.arange(num_slots, dtype=jnp.int32) // (num_slots // num_ranks)
        cost = jnp.matmul(load, price.T)  # [E + 1, P]
        move = cost[slots] - cost[slots, rank][:, None]  # [S, P]: of the slot to the rank
        # Slots of experts with several replicas.
        count = holds.sum(axis=1)
        several = count[slots] > 1
        position = jnp.where(several, jnp.arange(num_slots), num_slots)
        chosen = jnp.sort(position)[:most_slots].astype(jnp.int32)  # [J]
        used = chosen < num_slots
        slot = jnp.minimum(chosen, num_slots - 1)
        expert, home = slots[slot], rank[slot]
        held = holds[expert] > 0  # [J, P]
        ids = jnp.arange(num_ranks, dtype=jnp.int32)[None]
        others = held & (ids != home[:, None])
        tokens = load[expert]
        lowest = jnp.where(held[..., None], price[None], _FAR).min(axis=1)  # [J, W]
        without = jnp.where(others[..., None], price[None], _FAR).min(axis=1)
        lost = ((without - lowest) * tokens).sum(axis=1)  # [J]
        then = jnp.minimum(without[:, None], price[None]) - lowest[:, None]  # [J, P, W]
        moved = (then * tokens[:, None]).sum(axis=2)
        move = move.at[jnp.where(used, slot, num_slots)].set(moved, mode="drop")
        barred = (holds[slots] > 0) | (slowness == 0).T | (slots == num_experts)[:, None]
        move = jnp.where(barred, jnp.inf, move)
        # Swaps: for each slot the best other one.
        into = jnp.repeat(move, num_slots // num_ranks, axis=1)  # [S, S]
        pair = into + into.T
        first = price.sum(axis=1)[rank]
        # Each pair once: from the dearer rank.
        dearer = first[:, None] > first[None]
        tie = (first[:, None] == first[None]) & (rank[:, None] < rank[None])
        pair = jnp.where(dearer | tie, pair, jnp.inf)
        partner = pair.argmin(axis=1).astype(jnp.int32)
        swap = pair.min(axis=1)
        # Replacements: for each slot of an expert with several replicas the best newcomer.
        dear = (cost * holds).sum(axis=1) / jnp.maximum(count, 1.0)
        hot = jax.lax.top_k(dear[:num_experts], min(_HOT, num_experts))[1].astype(jnp.int32)
        has = holds[hot] > 0  # [H, P]
        now = jnp.where(has[..., None], price[None], _FAR).min(axis=1)  # [H, W]
        gained = (jnp.minimum(price[None] - now[:, None], 0.0) * load[hot][:, None]).sum(axis=2)
        gained = jnp.where(has | (slowness == 0).T, jnp.inf, gained)  # [H, P]
        replace = lost[:, None] + gained.T[home]  # [J, H]
        newcomer = hot[replace.argmin(axis=1)]
        replace = jnp.where(used, replace.min(axis=1), jnp.inf)
        value = -jnp.concatenate([swap, replace])
        value, best = jax.lax.top_k(value, min(num_changes, len(value)))
        nothing = jnp.full(most_slots, -1, jnp.int32)
        here = jnp.concatenate([jnp.arange(num_slots, dtype=jnp.int32), slot])
        there = jnp.concatenate([partner, nothing])
        newcomer = jnp.concatenate([slots[partner], newcomer])
        return Changes(here[best], there[best], newcomer[best], value > -jnp.inf)

    return jax.vmap(one_layer)(slots, holds, load, price)
