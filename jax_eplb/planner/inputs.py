"""Inputs: what `plan` refuses, with the value, the place and the remedy.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

# Above, float32 sums could overflow.
MAX_LOAD = 1e30


def check_load(load: np.ndarray, layer_ids: tuple[int, ...]) -> np.ndarray:
    """Every value checked; float64, as `load` is shaped."""
    # jnp's, which knows bfloat16.
    if not (jnp.issubdtype(load.dtype, jnp.integer) or jnp.issubdtype(load.dtype, jnp.floating)):
        raise ValueError(f"load is {load.dtype}; expected counts of tokens")
    values = load.astype(np.float64)
    wrong = ~((values >= 0) & (values <= MAX_LOAD))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        window = f"window {at[0]}, " if load.ndim == 3 else ""
        raise ValueError(
            f"{window}layer {layer_ids[at[-2]]}, expert {at[-1]}: load {values[at]}; expected a "
            f"count of tokens from 0 to {MAX_LOAD:.0e}; leave out damaged windows, or put 0 there"
        )
    return values


def check_capacity(
    capacity: Float[Array, "P"] | Sequence[float],
    num_experts: int,
    num_slots: int,
    num_ranks: int,
) -> Float[Array, "P"]:
    """Speeds of the ranks, checked unless traced."""
    values = jnp.asarray(capacity, jnp.float32)
    if values.shape != (num_ranks,):
        raise ValueError(f"capacity has shape {values.shape}; expected ({num_ranks},), a rank each")
    if isinstance(values, Tracer):
        return values
    host = np.asarray(values)
    if not (np.isfinite(host) & (host >= 0)).all():
        rank = int(np.argwhere(~(np.isfinite(host) & (host >= 0)))[0, 0])
        raise ValueError(f"capacity of rank {rank} is {host[rank]}; expected 0 or more")
    live = int((host > 0).sum()) * (num_slots // num_ranks)
    if live < num_experts:
        raise ValueError(
            f"ranks of a capacity above 0 have {live} slots for {num_experts} experts; "
            "use more slots, or more ranks"
        )
    return values


def check_topology(
    num_experts: int, num_ranks: int, num_nodes: int, num_groups: int, spread_replicas: bool
) -> None:
    for name, value in (("nodes", num_nodes), ("groups", num_groups)):
        if value < 1:
            raise ValueError(f"the number of {name} is {value}; it must be at least 1")
    if num_ranks % num_nodes:
        raise ValueError(
            f"{num_ranks} ranks cannot be divided among {num_nodes} nodes; "
            f"use a multiple of {num_nodes} ranks, or 1 node"
        )
    if num_experts % num_groups:
        raise ValueError(
            f"{num_experts} experts cannot be divided into {num_groups} groups; "
            "give the model's own number of groups, or 1 group"
        )
    if num_groups > 1 and num_groups % num_nodes:
        raise ValueError(
            f"{num_groups} groups cannot be divided among {num_nodes} nodes; "
            "without num_groups the experts are placed freely"
        )
    if spread_replicas and num_nodes < 2:
        raise ValueError("spread_replicas needs two nodes or more: give num_nodes")
