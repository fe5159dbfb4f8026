"""The ranks that a layer's experts are spread over, as replica choice and exchange see them.

Axes: P ranks, S slots.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int


class Ranks(NamedTuple):
    """A mesh axis and what stands along it; static."""

    axis_name: str
    num_ranks: int  # P
    slots_per_rank: int  # N
    ranks_per_node: int | None = None  # None: all on one node
    # Whether a row should rather stay on its rank or node; else what one rank sends another should
    # be alike for all pairs, as where the fullest one decides how large buffers are.
    prefers_near: bool = False

    def gather(self, counts: Int[Array, "M"]) -> Int[Array, "P M"]:
        """The counts of every rank; inside `shard_map` over the ranks."""
        return counts[None] if self.num_ranks == 1 else jax.lax.all_gather(counts, self.axis_name)

    def tell_all(self, slot_tokens: Int[Array, "S"]) -> "SlotTokens":
        """With what the other ranks send; inside `shard_map` over the ranks."""
        return SlotTokens(slot_tokens, self.gather(slot_tokens))

    def known_to_all(self, shares: Int[Array, "P S"]) -> "SlotTokens":
        """The same where every rank has worked out all ranks' shares."""
        return SlotTokens(shares[jax.lax.axis_index(self.axis_name)], shares)


class SlotTokens(NamedTuple):
    """How many choices go to each slot."""

    own: Int[Array, "S"]  # of this rank
    # Of every rank: more than one must know, but so all know the fullest pair without asking again.
    of_all: Int[Array, "P S"]
