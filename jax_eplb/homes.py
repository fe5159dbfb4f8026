"""Each expert's home: the slot that serves it alone while one is enough.

Axes: E experts, S slots, P ranks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def home_slots(
    slot_to_expert: Int[Array, "S"], start: Int[Array, "E"], num_ranks: int
) -> Int[Array, "E"]:
    """A slot of each expert, so that all ranks have about the same number of homes.

    `start` gives any slot of each. A home goes to another of its expert's slots as long as that is
    on a rank with at least two homes fewer; the largest difference first. Empty slots hold E.

    >>> home_slots(jnp.array([0, 1, 0, 2]), jnp.array([0, 1, 3]), num_ranks=2).tolist()
    [0, 1, 3]
    >>> home_slots(jnp.array([0, 1, 2, 0, 1, 3]), jnp.array([0, 1, 2, 5]), num_ranks=2).tolist()
    [3, 1, 2, 5]
    """
    num_experts, per_rank = start.size, slot_to_expert.size // num_ranks
    held = slot_to_expert < num_experts
    expert = jnp.where(held, slot_to_expert, 0)
    rank = jnp.arange(slot_to_expert.size, dtype=jnp.int32) // per_rank

    def best_change(home):
        """The slot that gains most as a home, and how many homes fewer its rank has."""
        homes = jnp.zeros(num_ranks, jnp.int32).at[home // per_rank].add(1)
        fewer = jnp.where(held, homes[home[expert] // per_rank] - homes[rank], 0)
        slot = fewer.argmax()
        return slot, fewer[slot]

    def change(carry):
        home, slot, _ = carry
        home = home.at[expert[slot]].set(slot.astype(home.dtype))
        return home, *best_change(home)

    start = start.astype(jnp.int32)
    home, _, _ = jax.lax.while_loop(lambda c: c[2] >= 2, change, (start, *best_change(start)))
    return home
