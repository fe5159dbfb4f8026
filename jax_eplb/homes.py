"""Each expert's home: the slot that serves it alone while one is enough.

Axes: E experts, S slots, P ranks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Changes of a home, for each rank, at most: a few do unless a group of ranks has too many together.
_CHANGES = 4
_NOWHERE = np.iinfo(np.int32).max


def home_slots(
    slot_to_expert: Int[Array, "S"], start: Int[Array, "E"], num_ranks: int
) -> Int[Array, "E"]:
    """A slot of each expert, so that the most homes of a rank are as few as can be.

    `start` gives any slot of each; empty slots hold E. As in push-relabel algorithms for flows
    (Goldberg and Tarjan, 1988): a home of a rank with too many goes to the rank that is lowest, and
    its old rank is then higher than that, so that it does not come back by the same way.

    >>> home_slots(jnp.array([0, 1, 0, 2]), jnp.array([0, 1, 3]), num_ranks=2).tolist()
    [0, 1, 3]
    >>> home_slots(jnp.array([0, 1, 2, 0, 1, 3]), jnp.array([0, 1, 2, 5]), num_ranks=2).tolist()
    [3, 1, 2, 5]
    """
    num_experts, per_rank = start.size, slot_to_expert.size // num_ranks
    held = slot_to_expert < num_experts
    expert = jnp.where(held, slot_to_expert, 0)
    rank = jnp.arange(slot_to_expert.size, dtype=jnp.int32) // per_rank
    in_use = held.reshape(num_ranks, per_rank).any(axis=1).sum()
    count = jnp.zeros(num_experts, jnp.int32).at[slot_to_expert].add(1, mode="drop")
    alone = held & (count[expert] == 1)
    most = jnp.maximum(-(-num_experts // in_use), alone.reshape(num_ranks, -1).sum(axis=1).max())

    def lowest(home, height):
        """Where a home of a rank that has too many may go, and whether there is such a place."""
        homes = jnp.zeros(num_ranks, jnp.int32).at[home // per_rank].add(1)
        present = (home // per_rank)[expert]
        may_go = held & (homes[present] > most) & (rank != present)
        # Of equally low ranks, that with the fewest homes.
        cost = jnp.where(may_go, height[rank] * (num_experts + 1) + homes[rank], _NOWHERE)
        slot = cost.argmin()
        return slot, may_go[slot] & (height[rank[slot]] < num_ranks)

    def change(carry):
        home, height, slot, _, changes = carry
        old = home[expert[slot]] // per_rank
        height = height.at[old].max(height[rank[slot]] + 1)
        home = home.at[expert[slot]].set(slot.astype(jnp.int32))
        return home, height, *lowest(home, height), changes + 1

    def goes_on(carry):
        *_, found, changes = carry
        return found & (changes < _CHANGES * num_ranks)

    start, height = start.astype(jnp.int32), jnp.zeros(num_ranks, jnp.int32)
    first = start, height, *lowest(start, height), jnp.int32(0)
    return jax.lax.while_loop(goes_on, change, first)[0]
