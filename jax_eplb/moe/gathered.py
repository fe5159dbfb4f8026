"""All-gather: every rank sees all tokens and computes the choices that its own slots serve.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, B = T·K choices of this
rank in one wave, M rows that are computed in one. Better than `all_to_all` where P is about K or
less: then most tokens go to most ranks anyway. The results travel by a reduce-scatter of rows that
are zero on all ranks but one, so nothing is rounded.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jax_eplb.kernels import counting_sort, take_rows
from jax_eplb.routing import Ranks, SlotOrder, segment_of


class GatheredWave(NamedTuple):
    """A bounded number of each rank's tokens, and which of their choices this rank computes."""

    choice: Int[Array, "B"]  # this rank's own; T·K past its last
    place: Int[Array, "T K"]  # B where a choice is not in this wave
    group_sizes: Int[Array, "N"]
    order: Int[Array, "M"]  # choices of all ranks in this wave, those of this rank's slots first
    first_token: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The tokens of all ranks, so many of each rank in a wave."""

    order: SlotOrder
    ranks: Ranks
    tokens_per_wave: int  # of each rank

    def num_waves(self) -> int:
        return -(-self.order.place.shape[0] // self.tokens_per_wave)

    def wave(self, index: Int[Array, ""] | int) -> GatheredWave:
        """The tokens of wave `index`."""
        num_tokens, choices_per_token = self.order.place.shape
        first = jnp.asarray(index, jnp.int32) * self.tokens_per_wave
        size = self.tokens_per_wave * choices_per_token
        choice = first * choices_per_token + jnp.arange(size, dtype=jnp.int32)
        place = jnp.arange(num_tokens * choices_per_token, dtype=jnp.int32) - choice[0]
        place = jnp.where((place >= 0) & (place < size), place, size)
        is_padding = self.order.place == num_tokens * choices_per_token
        place = jnp.where(is_padding, size, place.reshape(self.order.place.shape))

        slot_tokens = self.order.slot_tokens.own
        num_slots = len(slot_tokens)
        slot = segment_of(self.order.place, jnp.cumsum(slot_tokens, dtype=jnp.int32))
        slot = self._all_gather(
            self._window(jnp.where(is_padding, num_slots, slot), first, fill=num_slots)
        ).reshape(-1)
        per_rank = self.ranks.slots_per_rank
        own = slot - jax.lax.axis_index(self.ranks.axis_name) * per_rank
        own = jnp.where((own >= 0) & (own < per_rank), own, per_rank)
        # A token's choices go to different slots.
        most = self.ranks.num_ranks * self.tokens_per_wave * min(choices_per_token, per_rank)
        found = counting_sort(own, per_rank)
        choice = jnp.minimum(choice, num_tokens * choices_per_token)
        return GatheredWave(choice, place, found.counts, found.order[:most], first)

    def send_tokens(self, wave: GatheredWave, rows: Num[Array, "T *width"]):
        """The row of each choice that this rank serves, in the order of its slots."""
        everyone = self._all_gather(self._window(rows, wave.first_token))
        return take_rows(everyone, wave.order, self.order.place.shape[1])

    def send_choices(self, wave: GatheredWave, values: Num[Array, "T K"]) -> Num[Array, "M"]:
        """As `send_tokens`, one value for each choice."""
        return self._all_gather(self._window(values, wave.first_token)).reshape(-1)[wave.order]

    def send_back(self, wave: GatheredWave, rows: Num[Array, "M *width"]):
        """The rows [B, …] of this rank's choices, from the ranks that computed them."""
        num_choices = self.ranks.num_ranks * len(wave.choice)
        computed = jnp.arange(len(rows)) < wave.group_sizes.sum()
        rows = jnp.where(computed.reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)
        everyone = jnp.zeros_like(rows, shape=(num_choices, *rows.shape[1:]))
        everyone = everyone.at[wave.order].set(rows, unique_indices=True)
        if self.ranks.num_ranks == 1:
            return everyone
        return jax.lax.psum_scatter(everyone, self.ranks.axis_name, tiled=True)

    def _window(self, rows: Num[Array, "T *width"], first, fill=0):
        """This wave's tokens; the last wave is filled up."""
        missing = -len(rows) % self.tokens_per_wave
        if missing:
            padding = [(0, missing)] + [(0, 0)] * (rows.ndim - 1)
            rows = jnp.pad(rows, padding, constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(rows, first, self.tokens_per_wave)

    def _all_gather(self, rows):
        if self.ranks.num_ranks == 1:
            return rows
        return jax.lax.all_gather(rows, self.ranks.axis_name, tiled=True)
