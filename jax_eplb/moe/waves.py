"""Waves: rows to the ranks that hold their slots, and back, by `all_to_all` of bounded buffers.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, C rows at most that one
rank sends another in one wave, B rows of the send buffer, M = P·C rows of the receive buffer. A
choice is one (token, k) pair, numbered t·K + k; TK = T·K.

What a rank sends another is one run of the order by slot; a wave carries the next C of it. Both
sides know the runs from one exchange of counts, so rows travel without labels, and the receiver
brings them into the order of its slots by arithmetic, without a sort.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jax_eplb.kernels import take_rows
from jax_eplb.moe.wave_order import wave_order_by_xla
from jax_eplb.moe.wave_order_kernel import MAX_SLOTS, wave_order_by_kernel
from jax_eplb.routing import Ranks, SlotOrder


class Wave(NamedTuple):
    """One round there and back: a `WaveOrder`, and what rows packed tightly need."""

    choice: Int[Array, "B"]
    place: Int[Array, "T K"]
    group_sizes: Int[Array, "N"]
    arrival: Int[Array, "M"]
    departure: Int[Array, "M"]
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
        slot_tokens, rank = self.order.slot_tokens, jax.lax.axis_index(self.ranks.axis_name)
        arrays = (self.order.choice, self.order.place, *slot_tokens, rank, first)
        is_packed = self.ragged or num_ranks == 1
        by_xla = functools.partial(wave_order_by_xla, capacity=capacity, is_packed=is_packed)
        on_gpu = functools.partial(wave_order_by_kernel, capacity=capacity)
        if is_packed or len(slot_tokens.own) > MAX_SLOTS:
            on_gpu = by_xla
        order = jax.lax.platform_dependent(*arrays, cuda=on_gpu, default=by_xla)
        # Read where rows are packed alone.
        sent = jnp.clip(self.sent - first, 0, capacity)
        sent_start = jnp.cumsum(sent, dtype=jnp.int32) - sent
        received = jnp.clip(self.received.sum(axis=1) - first, 0, capacity)
        return Wave(**order._asdict(), sent=sent, sent_start=sent_start, received=received)

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
