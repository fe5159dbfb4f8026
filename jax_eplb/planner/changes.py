"""Changes: swaps and replacements of slots, what limits them, and how they are carried out.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank. The layers are the last
axis, for the reason that `replicate` gives.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SWAP, REPLACE_HERE, REPLACE_THERE = 0, 1, 2


class Slots(NamedTuple):
    """The state of a search."""

    experts: Int[Array, "P N L"]  # E in the slots of a rank that holds nothing
    weights: Float[Array, "P N L"]  # tokens of each slot
    count: Float[Array, "E L"]  # replicas


class Limits(NamedTuple):
    """What a search must respect; `None` where there is nothing to respect."""

    # Speed of each rank. One of speed 0 holds nothing.
    capacity: Float[Array, "P"] | None = None
    # At most `max_moves` slots may end with another expert than in `previous`.
    previous: Int[Array, "L S"] | None = None
    max_moves: Int[Array, "L"] | None = None
    # Tokens of an expert served outside its home node cost `cross_node_weight` each, as if the
    # fullest rank had as many more, divided by P.
    home: Int[Array, "L E"] | None = None
    cross_node_weight: Float[Array, ""] | None = None


NO_LIMITS = Limits()


def moves_of_swap(
    one: Int[Array, "..."],
    other: Int[Array, "..."],
    was_one: Int[Array, "..."],
    was_other: Int[Array, "..."],
) -> Int[Array, "..."]:
    """How many more slots differ from what they held once `one` and `other` have changed places.

    >>> moves_of_swap(*jnp.array([[5], [6], [5], [6]])).tolist()  # both leave where they were
    [2]
    """

    def differs(expert, was):
        return (expert != was).astype(jnp.int32)

    after = differs(other, was_one) + differs(one, was_other)
    return after - differs(one, was_one) - differs(other, was_other)


def count_earlier(experts: Int[Array, "... N"]) -> Int[Array, "... N"]:
    """How many earlier slots of the same rank hold the same expert.

    >>> count_earlier(jnp.array([[3, 1, 3, 3]])).tolist()
    [[0, 0, 1, 2]]
    """
    per_rank = experts.shape[-1]
    earlier = jnp.tril(jnp.ones((per_rank, per_rank), bool), -1)
    same = experts[..., :, None] == experts[..., None, :]
    earlier = earlier.reshape(*[1] * (experts.ndim - 1), per_rank, per_rank)
    return (same & earlier).astype(jnp.int32).sum(axis=-1)


class Moves(NamedTuple):
    """What may still move."""

    previous: Int[Array, "P N L"]
    left: Int[Array, "L"]


class Away(NamedTuple):
    """What it costs that experts are served outside their home nodes."""

    home: Int[Array, "P N L"]  # node, of the expert in each slot
    node: Int[Array, "P 1"]  # of each rank
    cost: Float[Array, ""]  # of one token, in tokens of the fullest rank


class Change(NamedTuple):
    """One change for each layer."""

    after: Float[Array, "L"]  # height of the fullest rank that it touches; inf if there is none
    kind: Int[Array, "L"]  # SWAP, REPLACE_HERE or REPLACE_THERE
    here: Int[Array, "L"]  # place on the fullest rank, 0..N-1
    there: Int[Array, "L"]  # slot of another rank, 0..S-1
    newcomer: Int[Array, "L"]  # the expert that replaces one here


def apply_change(
    slots: Slots,
    load: Float[Array, "E L"],
    change: Change,
    fullest: Int[Array, "L"],
    wanted: Bool[Array, "L"],
    *,
    replace: bool,
) -> Slots:
    """Carry out the change in the layers where it is wanted."""
    _, per_rank, num_layers = slots.experts.shape
    layers = jnp.arange(num_layers)
    here = fullest * per_rank + change.here
    # A slot swapped with itself stays.
    there = jnp.where(wanted & (change.kind != REPLACE_HERE), change.there, here)
    swapped = []
    for table in (slots.experts, slots.weights):
        flat = table.reshape(-1, num_layers)
        swapped.append(_set_two(table, here, flat[there, layers], there, flat[here, layers]))
    experts, weights = swapped
    if not replace:
        return Slots(experts, weights, slots.count)

    flat = slots.experts.reshape(-1, num_layers)
    mine, theirs = flat[here, layers], flat[there, layers]
    is_here, is_there = change.kind == REPLACE_HERE, change.kind == REPLACE_THERE
    # Of a replacement there, the swap already brought the winner to its slot.
    comes_here = jnp.where(wanted & is_here, change.newcomer, jnp.where(is_there, mine, theirs))
    experts = experts.reshape(-1, num_layers).at[here, layers].set(comes_here)
    experts = experts.reshape(slots.experts.shape)
    replaced = wanted & (is_here | is_there)
    loser, winner = jnp.where(is_here, mine, theirs), jnp.where(is_here, change.newcomer, mine)
    ids = jnp.arange(len(load), dtype=jnp.int32)[:, None]
    wins, loses = ids == winner[None], ids == loser[None]
    step = wins.astype(jnp.float32) - loses.astype(jnp.float32)
    count = slots.count + jnp.where(replaced[None], step, 0.0)
    share = load / jnp.maximum(count, 1.0)
    for changed, is_it in ((winner, wins), (loser, loses)):
        size = jnp.where(is_it, share, 0.0).sum(axis=0)
        weights = jnp.where(
            replaced[None, None] & (experts == changed[None, None]), size[None, None], weights
        )
    return Slots(experts, weights, count)


def _set_two(table: Array, first: Array, value: Array, second: Array, other: Array) -> Array:
    num_layers = table.shape[-1]
    layers = jnp.arange(num_layers)
    flat = table.reshape(-1, num_layers)
    return flat.at[first, layers].set(value).at[second, layers].set(other).reshape(table.shape)
