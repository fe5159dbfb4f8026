"""The order of a batch's choices by the slots that will serve them, from that by expert.

Axes: T tokens of this rank, K choices per token, E experts, S slots. A choice is one (token, k)
pair, numbered t·K + k; TK = T·K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.kernels import TopKSorted
from jax_eplb.kernels.threads import LONGEST
from jax_eplb.routing.ranks import Ranks, SlotTokens
from jax_eplb.routing.slot_order_kernel import order_by_kernel
from jax_eplb.tables import PlacementTables


class SlotOrder(NamedTuple):
    """The choices sorted by the slot that serves them, padding last."""

    choice: Int[Array, "TK"]  # the choice at each place of the order; T·K for padding
    place: Int[Array, "T K"]  # each choice's place in the order; T·K for padding
    slot_tokens: SlotTokens  # choices of each slot


def order_without_replicas(found: TopKSorted, ranks: Ranks) -> SlotOrder:
    """The order by slot where every expert has one, so that nothing is to be chosen.

    The slot of each expert is the `rank_of_expert` by which the choices were sorted.
    """
    return SlotOrder(found.choice, found.place, ranks.tell_all(found.run_sizes))


def order_by_slot(found: TopKSorted, slot_tokens: SlotTokens, tables: PlacementTables) -> SlotOrder:
    """Cut each expert's run of choices into runs of so many for each of its slots.

    Each expert's `slot_tokens` add up to its `expert_tokens`. The order of slots is that of ranks,
    so that what goes to one rank is one run, sorted by slot.
    """
    if found.choice.size == 0:
        return SlotOrder(found.choice, found.place, slot_tokens)
    arrays = found.place, slot_tokens.own, tables.slots_by_expert
    if slot_tokens.own.size > LONGEST:
        choice, place = order_by_xla(*arrays)
    else:
        choice, place = jax.lax.platform_dependent(
            *arrays, cuda=order_by_kernel, default=order_by_xla
        )
    return SlotOrder(choice, place, slot_tokens)


def order_by_xla(
    place: Int[Array, "T K"], slot_tokens: Int[Array, "S"], slots_by_expert: Int[Array, "S"]
) -> tuple[Int[Array, "TK"], Int[Array, "T K"]]:
    """`choice` and `place` of a `SlotOrder` from the places in the order by expert."""
    expert_start, expert_end = _starts_and_ends(slot_tokens[slots_by_expert])
    slot_start, slot_end = _starts_and_ends(slot_tokens)
    run = segment_of(place, expert_end)
    total = slot_end[-1:]
    moved = slot_start[slots_by_expert[run]] + place - expert_start[run]
    moved = jnp.where(place < total[None], moved, place.size)
    number = jnp.arange(place.size, dtype=jnp.int32)
    nobody = jnp.full_like(number, place.size)
    choice = nobody.at[moved.reshape(-1)].set(number, mode="drop", unique_indices=True)
    return choice, moved


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
