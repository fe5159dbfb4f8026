"""The tables that are derived from a placement: what the layer reads to find replicas.

Axes: L layers, E experts, S slots, P ranks, J slots of experts that have several.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.homes import home_slots
from jax_eplb.linear_algebra import exact_matmul, symmetric_inverse


def max_replicas(num_experts: int, num_slots: int, num_ranks: int) -> int:
    """The most replicas that one expert can have, from the sizes alone.

    Every other expert keeps a slot, and a rank needs no second replica of an expert unless it has
    more slots than there are experts.

    >>> max_replicas(num_experts=256, num_slots=288, num_ranks=36)
    33
    """
    per_rank = -(-num_slots // (num_ranks * num_experts))  # of one expert, if dealt evenly
    return min(num_slots - num_experts + 1, num_ranks * per_rank)


class PlacementTables(NamedTuple):
    """What the layer reads to find an expert's replicas; derived, never stored.

    One layer's tables are the same without the axis L. J = `max_replicated_slots`.
    """

    slot_to_expert: Int[Array, "L S"]  # E where a slot is empty
    # The slots of expert 0 first, ascending, then of 1 ...; empty ones last.
    slots_by_expert: Int[Array, "L S"]
    first_slot: Int[Array, "L E"]  # the lowest of each expert's; S where it has none
    replica_count: Int[Array, "L E"]
    # Which of its expert's slots each slot is, ascending from its home, which is 0, and on from the
    # lowest.
    replica_index: Int[Array, "L S"]
    # The slots of experts that have several, as they stand in `slots_by_expert`; S past the last.
    replicated_slots: Int[Array, "L J"]
    # Of `leveling_operator`, for the replica choice `balanced`; "L 0 0" where it was not asked for.
    leveling: Float[Array, "L J J"]
    # Of `handicap_of`, for the same choice: what slower ranks count as having already.
    handicap: Float[Array, "L P"]

    def of_layer(self, position: int) -> "PlacementTables":
        """One layer's tables, by its position among the layers."""
        return PlacementTables(*(table[position] for table in self))

    def in_one_array(self) -> tuple[Int[Array, "L M"], Callable[[Array], "PlacementTables"]]:
        """All tables side by side, for `scan` over layers; and what takes one row of it apart.

        `scan` cuts each array that it goes over apart in a launch of its own, which on a GPU takes
        a decoding step longer than all that is in them.
        """
        shapes = [table.shape[1:] for table in self]
        types = [table.dtype for table in self]
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        # Without those of no entries, on which XLA's partitioner of jax 0.11 crashes.
        bits = [jax.lax.bitcast_convert_type(table, jnp.int32) for table in self if table.size]
        rows = [table.reshape(table.shape[0], -1) for table in bits]

        def apart(row):
            parts = jnp.split(row, ends[:-1])
            return PlacementTables(
                *(
                    jax.lax.bitcast_convert_type(part.reshape(shape), dtype)
                    for part, shape, dtype in zip(parts, shapes, types, strict=True)
                )
            )

        return jnp.concatenate(rows, axis=1), apart


def max_replicated_slots(num_experts: int, num_slots: int) -> int:
    """The bound J on the slots whose expert has several: S - E spare ones are of as many experts.

    Rounded up to a power of two, 16 or more, as GPU kernels need; 0 where there are no spare slots.

    >>> max_replicated_slots(num_experts=256, num_slots=288)
    64
    """
    bound = min(num_slots, 2 * (num_slots - num_experts))
    return max(16, 1 << (bound - 1).bit_length()) if bound else 0


@functools.partial(jax.jit, static_argnames=("num_experts", "num_ranks", "with_leveling"))
def derive_tables(
    slot_to_expert: Int[Array, "L S"],
    *,
    num_experts: int,
    num_ranks: int,
    with_leveling: bool = False,
    capacity: Float[Array, "P"] | None = None,
) -> PlacementTables:
    """Invert `slot_to_expert`. `capacity`: the ranks' relative speeds; None: all alike.

    >>> tables = derive_tables(jnp.array([[0, 1, 2, 0]]), num_experts=3, num_ranks=2)
    >>> tables.slots_by_expert[0].tolist(), tables.replicated_slots[0, :3].tolist()
    ([0, 3, 1, 2], [0, 3, 4])
    >>> tables.first_slot[0].tolist(), tables.replica_count[0].tolist()
    ([0, 1, 2], [2, 1, 1])
    """
    num_slots = slot_to_expert.shape[1]
    if capacity is None:
        capacity = jnp.ones(num_ranks, jnp.float32)
    handicap = handicap_of(capacity)

    def one_layer(experts):
        order = jnp.argsort(experts, stable=True).astype(jnp.int32)
        count = jnp.zeros(num_experts, jnp.int32).at[experts].add(1)
        first = jnp.cumsum(count) - count

        def slot_of(replica):
            at = jnp.minimum(first + replica, num_slots - 1)
            return jnp.where(count > 0, order[at], num_slots)

        own = first.at[experts[order]].get(mode="fill", fill_value=num_slots)  # of empty slots, too
        index = jnp.maximum(jnp.arange(num_slots, dtype=jnp.int32) - own, 0)
        index = jnp.zeros(num_slots, jnp.int32).at[order].set(index, unique_indices=True)
        # Not the lowest slots of all to begin with, which would be on the first ranks.
        any_replica = jnp.arange(num_experts, dtype=jnp.int32) % jnp.maximum(count, 1)
        home = home_slots(experts, slot_of(any_replica), num_ranks)
        from_home = index - index[home].at[experts].get(mode="fill", fill_value=0)
        index = jnp.where(from_home < 0, from_home + count.at[experts].get(mode="clip"), from_home)
        several = count.at[experts[order]].get(mode="fill", fill_value=0) > 1
        num_places = max_replicated_slots(num_experts, num_slots)
        place = jnp.where(several, jnp.cumsum(several) - 1, num_places)
        replicated = jnp.full(num_places, num_slots, jnp.int32).at[place].set(order, mode="drop")
        leveling = jnp.zeros((0, 0), jnp.float32)
        if with_leveling:
            leveling = leveling_operator(replicated, experts, num_slots // num_ranks)
        return PlacementTables(
            experts, order, slot_of(0), count, index, replicated, leveling, handicap
        )

    return jax.vmap(one_layer)(slot_to_expert.astype(jnp.int32))


def handicap_of(capacity: Float[Array, "P"]) -> Float[Array, "P"]:
    """How many tokens fewer than the fastest rank each should have, in tokens of the mean rank.

    Levelled with so many on top, ranks have tokens in proportion to their speeds. 0 for ranks of
    speed 0, which get none.

    >>> handicap_of(jnp.array([1.0, 1.0, 0.0, 2.0])).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    share = capacity * (capacity.size / capacity.sum())
    return jnp.where(capacity > 0, share.max() - share, 0.0)


def leveling_operator(
    replicated_slots: Int[Array, "J"], slot_to_expert: Int[Array, "S"], slots_per_rank: int
) -> Float[Array, "J J"]:
    """What turns the heights of ranks into tokens to shift, for the replica choice `balanced`.

    Tokens of slots, each scaled by `leveling_scale`, may be shifted by any d that sums to zero
    (unscaled) over each expert's slots. Of these, -M (h + v) lowers |heights|^2 + |v + d|^2 most,
    where h are the slots' rank heights, divided by the scale, and v is any wish. M is symmetric,
    and zero for what is no slot.
    """
    if replicated_slots.size == 0:
        return jnp.zeros((0, 0), jnp.float32)
    used = replicated_slots < slot_to_expert.size
    alone = -1 - jnp.arange(replicated_slots.size, dtype=jnp.int32)  # no two of these are equal
    expert = jnp.where(used, slot_to_expert.at[replicated_slots].get(mode="clip"), alone)
    same_expert = (expert[:, None] == expert[None]).astype(jnp.float32)
    num_ranks = slot_to_expert.size // slots_per_rank
    # What is no slot, S, would be on rank P: a row of zeros.
    on_rank = jax.nn.one_hot(replicated_slots // slots_per_rank, num_ranks, dtype=jnp.float32)
    crowd = (on_rank * on_rank.sum(axis=0)[None]).sum(axis=1)
    weight = 1 / leveling_scale(jnp.maximum(crowd, 1.0))
    # With Q, which takes out what would change an expert's sum, and the Hessian H = I + U U',
    # M = Q (Q H Q)^-1 Q on the range of Q. That is Q - V (I + V' V)^-1 V' with V = Q U: the inverse
    # is of ranks, not of slots.
    squares = (same_expert * (weight * weight)[None]).sum(axis=1, keepdims=True)
    keep = jnp.eye(used.size, dtype=jnp.float32)
    keep = keep - same_expert * (weight[:, None] * weight[None]) / squares
    ranks = exact_matmul(keep, weight[:, None] * on_rank)  # V, [J, P]
    gram = jnp.eye(num_ranks, dtype=jnp.float32) + exact_matmul(ranks.T, ranks)
    return keep - exact_matmul(exact_matmul(ranks, symmetric_inverse(gram)), ranks.T)


def leveling_scale(crowd: Float[Array, "J"]) -> Float[Array, "J"]:
    """From how many replicated slots stand on the slot's rank: found by trials on recordings.

    >>> leveling_scale(jnp.array([4.0])).tolist()
    [1.0]
    """
    return jnp.sqrt(0.5 * jnp.sqrt(crowd))
