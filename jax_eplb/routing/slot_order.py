"""The order of a batch's choices by the slots that will serve them, from that by expert.

Axes: T tokens of this rank, K choices per token, E experts, S slots. A choice is one (token, k)
pair, numbered t·K + k; TK = T·K.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.kernels import TopKSorted
from jax_eplb.tables import PlacementTables


class SlotOrder(NamedTuple):
    """The choices sorted by the slot that serves them, padding last."""

    choice: Int[Array, "TK"]  # the choice at each place of the order; T·K for padding
    place: Int[Array, "T K"]  # each choice's place in the order; T·K for padding
    slot_tokens: Int[Array, "S"]  # choices of each slot


def order_without_replicas(found: TopKSorted) -> SlotOrder:
    """The order by slot where every expert has one, so that nothing is to be chosen.

    The slot of each expert is the `rank_of_expert` by which the choices were sorted.
    """
    return SlotOrder(found.choice, found.place, found.run_sizes)


def order_by_slot(
    found: TopKSorted, slot_tokens: Int[Array, "S"], tables: PlacementTables
) -> SlotOrder:
    """Cut each expert's run of choices into runs of so many for each of its slots.

    Each expert's `slot_tokens` add up to its `expert_tokens`. The order of slots is that of ranks,
    so that what goes to one rank is one run, sorted by slot.
    """
    num_choices = found.choice.size
    if num_choices == 0:
        return SlotOrder(found.choice, found.place, slot_tokens)
    by_expert = slot_tokens[tables.slots_by_expert]  # [S]
    expert_start, expert_end = _starts_and_ends(by_expert)
    slot_start, slot_end = _starts_and_ends(slot_tokens)
    # Where each slot's run begins in the order by expert.
    run_start = jnp.zeros_like(slot_start).at[tables.slots_by_expert].set(expert_start)

    row = jnp.arange(num_choices, dtype=jnp.int32)
    slot = segment_of(row, slot_end)
    choice = found.choice[jnp.minimum(run_start[slot] + row - slot_start[slot], num_choices - 1)]
    total = slot_end[-1:]
    choice = jnp.where(row < total, choice, num_choices)

    run = segment_of(found.place, expert_end)
    place = slot_start[tables.slots_by_expert[run]] + found.place - expert_start[run]
    place = jnp.where(found.place < total[None], place, num_choices)
    return SlotOrder(choice, place, slot_tokens)


def segment_of(index: Int[Array, "..."], ends: Int[Array, "M"]) -> Int[Array, "..."]:
    """The segment that each index lies in, of segments that end at `ends`; M - 1 past the last.

    >>> segment_of(jnp.arange(5), jnp.array([2, 2, 4])).tolist()
    [0, 0, 2, 2, 2]
    """
    # Unrolled: one fused kernel on a GPU, where a loop would be one for each step.
    found = jnp.searchsorted(ends, index, side="right", method="scan_unrolled")
    return jnp.minimum(found, len(ends) - 1).astype(jnp.int32)


def _starts_and_ends(sizes: Int[Array, "S"]) -> tuple[Int[Array, "S"], Int[Array, "S"]]:
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return ends - sizes, ends
