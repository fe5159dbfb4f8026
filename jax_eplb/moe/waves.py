"""Waves: rows to the ranks that hold their slots, and back, by `all_to_all` of bounded buffers.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, C rows at most that one
rank sends another in one wave, B rows of the send buffer, M = P·C rows of the receive buffer. A
choice is one (token, k) pair, numbered t·K + k; TK = T·K.

What a rank sends another is one run of the order by slot; a wave carries the next C of it. Both
sides know the runs from one exchange of counts, so rows travel without labels, and the receiver
brings them into the order of its slots by arithmetic, without a sort.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jax_eplb.kernels import take_rows
from jax_eplb.routing import Ranks, SlotOrder, segment_of


class Wave(NamedTuple):
    """One round there and back: which rows go, and in which order they are computed."""

    choice: Int[Array, "B"]  # sent in each row of the send buffer; T·K where it is empty
    place: Int[Array, "T K"]  # each choice's row of the send buffer; B where it does not go now
    group_sizes: Int[Array, "N"]
    arrival: Int[Array, "M"]  # the row of the receive buffer at each place of the order by slot
    departure: Int[Array, "M"]  # the inverse of `arrival`, for rows that hold something
    sent: Int[Array, "P"]
    sent_start: Int[Array, "P"]  # in the send buffer
    received: Int[Array, "P"]


@dataclasses.dataclass(frozen=True)
class Waves:
    """Padded `all_to_all` everywhere; with `ragged`, `ragged_all_to_all` of the full rows alone."""

    order: SlotOrder
    ranks: Ranks
    capacity: int  # C
    ragged: bool

    @property
    def sent(self) -> Int[Array, "P"]:
        """Rows for each rank, in all waves."""
        return self.order.slot_tokens.own.reshape(self.ranks.num_ranks, -1).sum(axis=1)

    @property
    def received(self) -> Int[Array, "P N"]:
        """Rows from each rank for each slot of this one, in all waves."""
        per_rank = self.ranks.slots_per_rank
        first = jax.lax.axis_index(self.ranks.axis_name) * per_rank
        return jax.lax.dynamic_slice_in_dim(self.order.slot_tokens.of_all, first, per_rank, axis=1)

    def num_waves(self) -> Int[Array, ""]:
        """Waves until the fullest pair of ranks is done; the same on every rank."""
        num_ranks = self.ranks.num_ranks
        pairs = self.order.slot_tokens.of_all.reshape(num_ranks, num_ranks, -1).sum(axis=2)
        return -(-pairs.max() // self.capacity)

    def wave(self, index: Int[Array, ""] | int) -> Wave:
        """The rows C·i .. C·i + C - 1 of each rank's run to each other one."""
        num_ranks, capacity = self.ranks.num_ranks, self.capacity
        num_choices = self.order.choice.size
        if num_ranks == 1 and capacity >= num_choices:
            return self._all_here()
        first = jnp.asarray(index, jnp.int32) * capacity
        run_end = jnp.cumsum(self.sent, dtype=jnp.int32)
        run_start = run_end - self.sent
        sent = jnp.clip(self.sent - first, 0, capacity)
        if self.ragged or num_ranks == 1:  # packed tightly
            size = min(num_choices, num_ranks * capacity)
            sent_end = jnp.cumsum(sent, dtype=jnp.int32)
            sent_start = sent_end - sent
        else:  # each rank's rows at their own place
            size = num_ranks * capacity
            sent_start = jnp.arange(num_ranks, dtype=jnp.int32) * capacity
            sent_end = sent_start + capacity

        row = jnp.arange(size, dtype=jnp.int32)
        peer = segment_of(row, sent_end)
        turn = row - sent_start[peer]
        source = jnp.minimum(run_start[peer] + first + turn, num_choices - 1)
        choice = jnp.where(turn < sent[peer], self.order.choice[source], num_choices)

        peer = segment_of(self.order.place, run_end)
        turn = self.order.place - run_start[peer] - first
        goes = (turn >= 0) & (turn < sent[peer])
        place = jnp.where(goes, sent_start[peer] + turn, size)

        arrivals = _order_of_arrivals(self.received, first, capacity)
        received = jnp.clip(self.received.sum(axis=1) - first, 0, capacity)
        return Wave(choice, place, *arrivals, sent, sent_start, received)

    def send_tokens(self, wave: Wave, rows: Num[Array, "T *width"]) -> Num[Array, "M *width"]:
        """Each choice's row to the rank that holds its slot, in the order of the slots there."""
        return self._send(wave, take_rows(rows, wave.choice, self.order.place.shape[1]))

    def send_choices(self, wave: Wave, values: Num[Array, "T K"]) -> Num[Array, "M"]:
        """As `send_tokens`, one value for each choice."""
        return self._send(wave, values.reshape(-1)[jnp.minimum(wave.choice, values.size - 1)])

    def send_back(self, wave: Wave, rows: Num[Array, "M *width"]) -> Num[Array, "B *width"]:
        """From the order of this rank's slots back to the send buffers."""
        if self.ranks.num_ranks == 1:
            return rows
        leaving = take_rows(rows, wave.departure)
        if not self.ragged:
            return all_to_all(leaving, self.ranks)
        kept_at = jnp.arange(self.ranks.num_ranks, dtype=jnp.int32) * self.capacity
        # Where each rank wants its rows back, it alone knows.
        wanted_at = all_to_all(wave.sent_start, self.ranks)
        return jax.lax.ragged_all_to_all(
            leaving,
            jnp.zeros_like(leaving, shape=(len(wave.choice), *leaving.shape[1:])),
            kept_at,
            wave.received,
            wanted_at,
            wave.sent,
            axis_name=self.ranks.axis_name,
        )

    def _send(self, wave: Wave, rows: Num[Array, "B *width"]) -> Num[Array, "M *width"]:
        if self.ranks.num_ranks == 1:
            return rows  # in the order of the slots already
        if not self.ragged:
            return take_rows(all_to_all(rows, self.ranks), wave.arrival)
        own_place = jax.lax.axis_index(self.ranks.axis_name) * self.capacity
        received = jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros_like(rows, shape=(len(wave.arrival), *rows.shape[1:])),
            wave.sent_start,
            wave.sent,
            jnp.full_like(wave.sent, own_place),
            wave.received,
            axis_name=self.ranks.axis_name,
        )
        return take_rows(received, wave.arrival)

    def _all_here(self) -> Wave:
        """The only wave of the only rank: the order by slot is that of the buffers."""
        order, nothing = self.order, jnp.zeros(0, jnp.int32)
        return Wave(
            order.choice,
            order.place,
            order.slot_tokens.own,
            nothing,
            nothing,
            nothing,
            nothing,
            nothing,
        )


def all_to_all(rows: Num[Array, "B *width"], ranks: Ranks) -> Num[Array, "B *width"]:
    """Block p of the rows, of P equal ones, to rank p."""
    if ranks.num_ranks == 1:
        return rows
    return jax.lax.all_to_all(rows, ranks.axis_name, split_axis=0, concat_axis=0, tiled=True)


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
