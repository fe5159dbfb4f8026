"""The ranks' relative speeds when they change: what is checked, and which ranks are lost.

Axes: L layers, E experts, S slots, P ranks.
"""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from jax_eplb.moving import check_held, find_moves
from jax_eplb.online.state import BalancerState, layers_on
from jax_eplb.placement import Placement
from jax_eplb.planner.inputs import check_capacity


def checked_capacity(
    capacity: Sequence[float], placement: Placement, lost_ranks: Collection[int] = ()
) -> np.ndarray:
    """float32[P].

    Raises ValueError where the ranks of a speed above 0 have too few slots for all experts, or a
    lost rank is unknown or has a speed.

    >>> placement = Placement.default(num_experts=4, num_slots=6, num_ranks=2)
    >>> checked_capacity([1.0, 0.0], placement)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ranks of a capacity above 0 have 3 slots for 4 experts; use more slots, or more...
    """
    sizes = placement.num_experts, placement.num_slots, placement.num_ranks
    values = np.asarray(check_capacity(jnp.asarray(np.asarray(capacity, np.float32)), *sizes))
    for rank in lost_ranks:
        if not 0 <= rank < values.size:
            raise ValueError(f"rank {rank} cannot be lost; there are 0 to {values.size - 1}")
        if values[rank] > 0:
            raise ValueError(f"rank {rank} is lost but has a capacity of {values[rank]}; give it 0")
    return values


def lost_after(
    state: BalancerState,
    capacity: np.ndarray,
    lost: frozenset[int],
    newly_lost: Collection[int],
    in_force: Placement,
    has_host: bool,
) -> frozenset[int]:
    """The ranks whose weights cannot be read, once the ranks have these speeds.

    Those that were lost before are whole again where they have a speed: they are empty, and what
    comes to them is written anew. Raises ValueError where one is not yet empty, or the placement
    in force has experts on lost ranks alone and there is no host copy.
    """
    back = sorted(rank for rank in lost if capacity[rank] > 0)
    layer_ids = in_force.layer_ids
    left = [layer_ids[i] for i in np.flatnonzero(layers_on(state, back))]
    if left:
        raise ValueError(
            f"ranks {back} are lost and still have experts of the layers {left}; leave their speed "
            "0 until these have moved elsewhere"
        )
    lost = (lost | set(newly_lost)) - set(back)
    if lost and not has_host:
        table = np.asarray(in_force.slot_to_expert)
        sizes = {"num_ranks": in_force.num_ranks, "num_experts": in_force.num_experts}
        moves = find_moves(table, table, lost_ranks=lost, **sizes)
        check_held(moves, layer_ids, lost)
    return lost
