"""Inputs: what `plan` refuses, with the value, the place and the remedy.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

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


def check_previous(
    table: Int[Array, "L S"], shape: tuple[int, int], num_experts: int, layer_ids: tuple[int, ...]
) -> Int[Array, "L S"]:
    """The placement in force; its ids are checked unless traced. E is an empty slot's."""
    if table.shape != shape:
        raise ValueError(
            f"previous has shape {table.shape}; expected {shape}, the layers of the load and the "
            "slots of the plan"
        )
    if not isinstance(table, Tracer):
        host = np.asarray(table)
        wrong = (host < 0) | (host > num_experts)
        if wrong.any():
            layer, slot = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"previous, layer {layer_ids[layer]}, slot {slot}: expert {host[layer, slot]}; "
                f"expected 0 to {num_experts - 1}, or {num_experts} in a slot that is empty"
            )
    return jnp.asarray(table, jnp.int32)


def check_moves(max_moves: int | Int[Array, "L"] | None, num_layers: int) -> Int[Array, "L"] | None:
    """The limit of each layer, checked unless traced."""
    if max_moves is None:
        return None
    if isinstance(max_moves, Tracer):
        return jnp.broadcast_to(max_moves.astype(jnp.int32), (num_layers,))
    host = np.asarray(max_moves)
    if not np.issubdtype(host.dtype, np.integer) or host.shape not in ((), (num_layers,)):
        raise ValueError(
            f"max_moves is {max_moves!r}; expected a whole number, or one for each of the "
            f"{num_layers} layers"
        )
    if (host < 0).any():
        raise ValueError(f"max_moves is {host.min()}; expected 0 or more")
    # By NumPy, which compiles nothing.
    host = np.minimum(host, np.iinfo(np.int32).max).astype(np.int32)
    return jnp.asarray(np.broadcast_to(host, (num_layers,)))


def check_capacity(
    capacity: Float[Array, "P"] | Sequence[float],
    num_experts: int,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
) -> Float[Array, "P"]:
    """Speeds of the ranks, checked unless traced. `num_nodes`: each holds E / Q experts."""
    values = jnp.asarray(capacity, jnp.float32)
    if values.shape != (num_ranks,):
        raise ValueError(f"capacity has shape {values.shape}; expected ({num_ranks},), a rank each")
    if isinstance(values, Tracer):
        return values
    host = np.asarray(values)
    if not (np.isfinite(host) & (host >= 0)).all():
        rank = int(np.argwhere(~(np.isfinite(host) & (host >= 0)))[0, 0])
        raise ValueError(f"capacity of rank {rank} is {host[rank]}; expected 0 or more")
    live = (host > 0).reshape(num_nodes, -1).sum(axis=1) * (num_slots // num_ranks)
    node, needed = int(live.argmin()), num_experts // num_nodes
    if live[node] >= needed:
        return values
    if num_nodes == 1:
        raise ValueError(
            f"ranks of a capacity above 0 have {live[0]} slots for {num_experts} experts; "
            "use more slots, or more ranks"
        )
    raise ValueError(
        f"node {node}: its ranks of a capacity above 0 have {live[node]} slots for the {needed} "
        "experts of its groups; use more slots, or place the experts freely, without num_groups"
    )


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


def check_cross_node_weight(
    weight: float | None, num_nodes: int, num_groups: int, spread_replicas: bool
) -> Float[Array, ""] | None:
    """Whether groups may leave their nodes, and whether they must."""
    grouped = num_groups > 1 and num_nodes > 1
    if weight is None:
        if spread_replicas and grouped:
            raise ValueError(
                "spread_replicas puts replicas on two nodes, num_groups keeps them on one: "
                "give cross_node_weight, or leave one out"
            )
        return None
    if not grouped:
        raise ValueError(
            "cross_node_weight is for groups that belong on nodes: give num_nodes and num_groups"
        )
    if not isinstance(weight, Tracer) and not 0 <= float(weight) < np.inf:
        raise ValueError(f"cross_node_weight is {weight}; expected 0 or more")
    return jnp.asarray(weight, jnp.float32)


def check_method(method: str, **unused: bool) -> None:
    """`unused`: the arguments that DeepSeek's plans know nothing of, and whether they are given."""
    if method not in ("search", "deepseek"):
        raise ValueError(f"method {method!r} must be 'search' or 'deepseek'")
    for name, given in unused.items():
        if given and method == "deepseek":
            raise ValueError(f"method 'deepseek' knows no {name}; leave it out, or use 'search'")
