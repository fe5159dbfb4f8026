"""Which rows travel in a wave, and in which order they are computed.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, S = P·N slots, C rows
at most that one rank sends another, B rows of the send buffer, M = P·C rows of the receive buffer.
A choice is one (token, k) pair, numbered t·K + k; TK = T·K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing import SlotOrder, segment_of


class Wave(NamedTuple):
    """One round there and back: which rows go, and in which order they are computed."""

    choice: Int[Array, "B"]  # sent in each row of the send buffer; T·K where it is empty
    place: Int[Array, "T K"]  # each choice's row of the send buffer; B where it does not go now
    group_sizes: Int[Array, "N"]
    arrival: Int[Array, "M"]  # the row of the receive buffer at each place of the order by slot
    departure: Int[Array, "M"]  # the inverse of `arrival`, for rows that hold something
    first: Int[Array, ""]  # rows of each pair of ranks that earlier waves took


def wave_order_by_xla(
    order: SlotOrder,
    rank: Int[Array, ""],
    first: Int[Array, ""],
    *,
    capacity: int,
    is_packed: bool = False,
) -> Wave:
    """The rows from `first` to `first` + C - 1 of each rank's run to each other one.

    In the send buffer, rows for a rank stand at its own C rows, or (`is_packed`) right after those
    for the rank before.
    """
    own, of_all = order.slot_tokens
    num_ranks, num_slots = of_all.shape
    per_rank, num_choices = num_slots // num_ranks, order.choice.size
    for_ranks = own.reshape(num_ranks, per_rank).sum(axis=1, dtype=jnp.int32)
    run_end = jnp.cumsum(for_ranks, dtype=jnp.int32)
    run_start = run_end - for_ranks
    sent = jnp.clip(for_ranks - first, 0, capacity)
    if is_packed:
        size = min(num_choices, num_ranks * capacity)
        sent_end = jnp.cumsum(sent, dtype=jnp.int32)
        sent_start = sent_end - sent
    else:
        size = num_ranks * capacity
        sent_start = jnp.arange(num_ranks, dtype=jnp.int32) * capacity
        sent_end = sent_start + capacity

    row = jnp.arange(size, dtype=jnp.int32)
    peer = segment_of(row, sent_end)
    turn = row - sent_start[peer]
    source = jnp.minimum(run_start[peer] + first + turn, num_choices - 1)
    choice = jnp.where(turn < sent[peer], order.choice[source], num_choices)

    peer = segment_of(order.place, run_end)
    turn = order.place - run_start[peer] - first
    goes = (turn >= 0) & (turn < sent[peer])
    place = jnp.where(goes, sent_start[peer] + turn, size)

    received = jax.lax.dynamic_slice_in_dim(of_all, rank * per_rank, per_rank, axis=1)
    return Wave(choice, place, *_order_of_arrivals(received, first, capacity), first)


def _order_of_arrivals(received: Int[Array, "P N"], first: Int[Array, ""], capacity: int):
    """`group_sizes`, `arrival` and `departure`: received rows come by rank, then by slot."""
    num_ranks, slots_per_rank = received.shape
    end = jnp.cumsum(received, axis=1, dtype=jnp.int32)
    # Each run of rows for one slot, as far as it lies in this wave.
    run_start = jnp.clip(end - received - first, 0, capacity)  # [P, N], in the rank's buffer
    run_end = jnp.clip(end - first, 0, capacity)
    by_slot = (run_end - run_start).T  # [N, P]: the order in which rows are computed
    placed_end = jnp.cumsum(by_slot.reshape(-1), dtype=jnp.int32)
    placed_start = (placed_end - by_slot.reshape(-1)).reshape(slots_per_rank, num_ranks)

    row = jnp.arange(num_ranks * capacity, dtype=jnp.int32)
    run = segment_of(row, placed_end)
    slot, rank = run // num_ranks, run % num_ranks
    arrival = rank * capacity + run_start[rank, slot] + row - placed_start[slot, rank]

    rank, turn = row // capacity, row % capacity
    slot = jax.vmap(segment_of)(turn.reshape(num_ranks, capacity), run_end).reshape(-1)
    departure = placed_start[slot, rank] + turn - run_start[rank, slot]
    last = row.size - 1
    return by_slot.sum(axis=1), jnp.clip(arrival, 0, last), jnp.clip(departure, 0, last)
