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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jax_eplb.kernels import take_rows
from jax_eplb.kernels.threads import LONGEST
from jax_eplb.moe.wave_order import Wave, wave_order_by_xla
from jax_eplb.moe.wave_order_kernel import wave_order_by_kernel
from jax_eplb.routing import Ranks, SlotOrder


@dataclasses.dataclass(frozen=True)
class Waves:
    """Padded `all_to_all` everywhere; with `ragged`, `ragged_all_to_all` of the full rows alone."""

    order: SlotOrder
    ranks: Ranks
    capacity: int  # C
    ragged: bool

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
        arrays = (self.order, jax.lax.axis_index(self.ranks.axis_name), first)
        is_packed = self.ragged or num_ranks == 1
        by_xla = functools.partial(wave_order_by_xla, capacity=capacity, is_packed=is_packed)
        on_gpu = functools.partial(wave_order_by_kernel, capacity=capacity)
        if is_packed or len(self.order.slot_tokens.own) > LONGEST:
            on_gpu = by_xla
        return jax.lax.platform_dependent(*arrays, cuda=on_gpu, default=by_xla)

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
        sent, sent_start, received = self._packed_runs(wave)
        kept_at = jnp.arange(self.ranks.num_ranks, dtype=jnp.int32) * self.capacity
        # Where each rank wants its rows back, it alone knows.
        wanted_at = all_to_all(sent_start, self.ranks)
        return jax.lax.ragged_all_to_all(
            leaving,
            jnp.zeros_like(leaving, shape=(len(wave.choice), *leaving.shape[1:])),
            kept_at,
            received,
            wanted_at,
            sent,
            axis_name=self.ranks.axis_name,
        )

    def _send(self, wave: Wave, rows: Num[Array, "B *width"]) -> Num[Array, "M *width"]:
        if self.ranks.num_ranks == 1:
            return rows  # in the order of the slots already
        if not self.ragged:
            return take_rows(all_to_all(rows, self.ranks), wave.arrival)
        sent, sent_start, received = self._packed_runs(wave)
        own_place = jax.lax.axis_index(self.ranks.axis_name) * self.capacity
        arrived = jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros_like(rows, shape=(len(wave.arrival), *rows.shape[1:])),
            sent_start,
            sent,
            jnp.full_like(sent, own_place),
            received,
            axis_name=self.ranks.axis_name,
        )
        return take_rows(arrived, wave.arrival)

    def _packed_runs(self, wave: Wave) -> tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]]:
        """Rows for each rank in the wave, where they begin in the send buffer; rows from each."""
        num_ranks, per_rank = self.ranks.num_ranks, self.ranks.slots_per_rank
        own, of_all = self.order.slot_tokens
        first_slot = jax.lax.axis_index(self.ranks.axis_name) * per_rank
        from_ranks = jax.lax.dynamic_slice_in_dim(of_all, first_slot, per_rank, axis=1)
        for_ranks = own.reshape(num_ranks, per_rank)
        sent, received = (
            jnp.clip(runs.sum(axis=1) - wave.first, 0, self.capacity)
            for runs in (for_ranks, from_ranks)
        )
        return sent, jnp.cumsum(sent, dtype=jnp.int32) - sent, received

    def _all_here(self) -> Wave:
        """The only wave of the only rank: the order by slot is that of the buffers."""
        order, nothing = self.order, jnp.zeros(0, jnp.int32)
        return Wave(
            order.choice,
            order.place,
            order.slot_tokens.own,
            nothing,
            nothing,
            jnp.int32(0),
        )


def all_to_all(rows: Num[Array, "B *width"], ranks: Ranks) -> Num[Array, "B *width"]:
    """Block p of the rows, of P equal ones, to rank p."""
    if ranks.num_ranks == 1:
        return rows
    return jax.lax.all_to_all(rows, ranks.axis_name, split_axis=0, concat_axis=0, tiled=True)
