"""Bound: what no placement can beat.

Axes: L layers, E experts, S slots, P ranks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_eplb.placement import check_sizes
from jax_eplb.planner.dual_feasible import raise_by_functions
from jax_eplb.planner.pair_functions import raise_by_mixtures
from jax_eplb.split import Split


@functools.partial(jax.jit, static_argnames=("num_slots", "num_ranks", "split", "simple"))
def lower_bound(
    load: Float[Array, "*windows L E"],
    *,
    num_slots: int,
    num_ranks: int,
    split: Split = "even",
    capacity: Float[Array, "P"] | None = None,
    simple: bool = False,
) -> Float[Array, "L"]:
    """An imbalance that no placement has less of, in each layer; 0 where there is no load.

    The fullest rank holds at least the mean, and at least the largest replica, which cannot be
    smaller than the least M with Σ ceil(load / M) ≤ S, whether an expert's replicas share its
    tokens evenly or freely. Dual-feasible functions of the sizes of all replicas raise that
    further: one by one under the even split, and in mixtures, where ranks have two slots, under
    either split. With windows, the imbalance bounded is the mean over those with tokens, of one
    placement for all. A rank's height is convex in the load, so the bound of the mean window holds
    there too, and the larger of it and the mean of the windows' bounds counts.

    `simple` leaves it at the mean and the largest replica, which takes no time to speak of.

    With `capacity`, heights are loads per capacity, and a rank of capacity 0 holds nothing. Ranks
    that differ otherwise get the mean and the largest replica on the fastest rank alone. Raises
    ValueError where S < E, P does not divide S, or the split is unknown.

    In float32 the height, 1 + imbalance, is at most 1e-6 too high: a rounded sum of the load scales
    all heights by as much, and what refutes one leaves room for rounding (`dual_feasible`,
    `pair_functions`).

    >>> lower_bound(jnp.array([[90.0, 10, 10, 10]]), num_slots=6, num_ranks=3).tolist()
    [0.0]
    >>> lower_bound(jnp.array([[90.0, 10, 10, 10]]), num_slots=4, num_ranks=4).round(3)
    Array([2.], dtype=float32)

    The 7 shares its rank, with 3 at the least: 10, and the mean is 9.

    >>> found = lower_bound(jnp.array([[7.0, 5, 5, 4, 3, 3]]), num_slots=6, num_ranks=3)
    >>> [f"{bound:.3f}" for bound in found.tolist()]
    ['0.111']
    """
    check_sizes(load.shape[-1], num_slots, num_ranks)
    if split not in ("even", "balanced"):
        raise ValueError(f"the split is {split!r}; it must be 'even' or 'balanced'")
    slots_per_rank = num_slots // num_ranks
    live, fastest = jnp.float32(num_ranks), jnp.float32(1)
    if capacity is not None:
        capacity = jnp.asarray(capacity, jnp.float32)
        live = (capacity > 0).astype(jnp.float32).sum()
        # As parts of the mean of the live ranks.
        fastest = jnp.maximum(capacity.max() * live / jnp.maximum(capacity.sum(), 1e-30), 1.0)
    slots = live * slots_per_rank
    load = load.astype(jnp.float32)
    total = load.sum(axis=-1)
    scale = jnp.where(total > 0, live / jnp.where(total > 0, total, 1.0), 0.0)  # a mean of 1 a rank

    def of_window(window):
        scaled = window[0] * window[1][:, None]
        return jnp.maximum(_largest_replica(scaled, slots) / fastest, 1.0)  # 1 where no load is

    least = jnp.ones(load.shape[-2], jnp.float32)
    if load.ndim > 2:
        load = load.reshape(-1, *load.shape[-2:])
        scale = scale.reshape(-1, scale.shape[-1])
        number = jnp.maximum((scale > 0).astype(jnp.float32).sum(0), 1.0)
        heights = jax.lax.map(of_window, (load, scale))  # one by one, which needs little memory
        least = 1 + (heights - 1).sum(0) / number
        load = jnp.einsum("wle,wl->le", load, scale, precision="highest")
        scale = 1 / number
    bound = jnp.maximum(of_window((load, scale)), least)
    if simple:
        return bound - 1
    load = load * scale[:, None]
    alike = fastest <= 1 + 1e-6
    # Without a slot to spare there is nothing to split, so both splits are one.
    even = split == "even" or num_slots == load.shape[-1]
    if slots_per_rank > 1 and even:
        raised = raise_by_functions(
            load, bound, num_slots=slots, num_ranks=live, slots_per_rank=slots_per_rank
        )
        bound = jnp.where(alike, raised, bound)
    if slots_per_rank == 2:
        bound = raise_by_mixtures(load, bound, num_ranks=live, active=alike, divisible=not even)
    return bound - 1


def _largest_replica(load: Float[Array, "... E"], slots: Float[Array, ""]) -> Float[Array, "..."]:
    """The least size that the largest replica can have: that of greedy replication.

    Bisects the size; counts change only at quotients of the loads, so both ends move on to one.

    >>> _largest_replica(jnp.array([10.0, 5, 2, 15, 8]), jnp.float32(9)).tolist()
    5.0
    """

    def halve(ends):
        low, high = ends
        size = (low + high) / 2
        count = jnp.maximum(jnp.ceil(load / jnp.where(size > 0, size, 1.0)[..., None]), 1.0)
        fits = count.sum(axis=-1) <= slots
        fewer = jnp.where(count > 1, load / jnp.maximum(count - 1, 1.0), jnp.inf)
        return (
            jnp.where(fits, low, jnp.clip(fewer.min(axis=-1), size, high)),
            jnp.where(fits, jnp.minimum((load / count).max(axis=-1), size), high),
        )

    # Float32 cannot tell ends nearer than this apart.
    def apart(ends):
        return (ends[0] < ends[1] * (1 - 2e-7)).any()

    low = load.sum(axis=-1) / slots * (1 - 1e-6)
    return jax.lax.while_loop(apart, halve, (low, load.max(axis=-1)))[1]
