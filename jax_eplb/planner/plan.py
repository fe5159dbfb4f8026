"""Plan: from load to a placement, all layers at once.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank, Q nodes.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from jax_eplb.placement import Placement, check_layer_ids, check_sizes
from jax_eplb.planner.bound import lower_bound
from jax_eplb.planner.choose import choose_layers
from jax_eplb.planner.deepseek import usable_groups
from jax_eplb.planner.effort import effort_of
from jax_eplb.planner.from_load import from_load
from jax_eplb.planner.from_previous import from_previous
from jax_eplb.planner.inputs import (
    MAX_LOAD,
    check_capacity,
    check_cross_node_weight,
    check_load,
    check_method,
    check_moves,
    check_previous,
    check_topology,
)
from jax_eplb.planner.replan import count_moves
from jax_eplb.planner.score import score_balanced, score_even
from jax_eplb.planner.sizes import Sizes
from jax_eplb.planner.topology import cross_node_share
from jax_eplb.split import even_split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A placement, what it should give, what no placement could beat, what it costs. A pytree.

    `imbalance` and `lower_bound` are (max - mean) / mean of the ranks' tokens on the load planned
    for, under the split planned for, a mean over windows; with a capacity, of the ranks' times.
    """

    placement: Placement
    imbalance: Float[Array, "L"]
    # The optimum may lie above it, never below.
    lower_bound: Float[Array, "L"]
    # Slots whose expert changes; None where there was no placement before.
    moves: Int[Array, "L"] | None = None
    # The part of the tokens served off their group's node; None without groups.
    cross_node: Float[Array, "L"] | None = None

    @property
    def gap(self) -> Float[Array, "L"]:
        """The fullest rank is at most this part above that of the best placement there is."""
        return (self.imbalance - self.lower_bound) / (1 + self.lower_bound)


def plan(
    load: Num[Array, "*windows L E"] | np.ndarray,
    num_slots: int,
    num_ranks: int,
    *,
    previous: Placement | Int[Array, "L S"] | None = None,
    max_moves: int | Int[Array, "L"] | None = None,
    split: str = "even",
    effort: str = "default",
    method: str = "search",
    num_nodes: int = 1,
    num_groups: int = 1,
    cross_node_weight: float | None = None,
    spread_replicas: bool = False,
    capacity: Float[Array, "P"] | Sequence[float] | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Plan:
    """Place E experts in S slots of P ranks so that the fullest rank has as little as possible.

    `load` counts tokens by expert: [L, E], or [W, L, E] with one window for each iteration, and
    then the mean over iterations like these is what counts. Any numbers, NumPy's 64-bit ones
    included.

    previous, max_moves: start from this placement, and change at most so many slots of each layer
        (a number, or one for each layer). Experts that stay on a rank keep their slots, and where
        little is to be gained nothing moves. Without `max_moves` a fresh plan is considered too.
    split: how the layer will divide an expert's tokens among its replicas, "even" or "balanced".
    effort: "fast" (one way to replicate, windows added up), "default" or "best".
    method: "search", or "deepseek" for the plans of deepseek-ai/EPLB, slot for slot.
    num_nodes, num_groups: the groups of experts that a router picks from stay on one node each. A
        layer of `previous` in which they do not is left so where `max_moves` does not suffice.
    cross_node_weight: let them leave it where that lowers imbalance by more than this weight times
        the part of the tokens that is then served elsewhere.
    spread_replicas: the replicas of an expert are on two nodes at least; with S >= 2 E every expert
        has two. With `max_moves`, as far as these suffice.
    capacity: relative speed of each rank. A rank of speed 0 holds nothing: its slots hold the id E.
        What must move because ranks are gone or came back moves even past `max_moves`.
    layer_ids: the layers' own numbers; by default those of `previous`, else 0, 1, ...

    Deterministic: every process that plans from the same load gets the same plan. Works under
    `jit` and `vmap` with the sizes static; values are then not checked. A second plan of the same
    shapes compiles nothing. Without `previous`, experts within a rank stand in ascending order.

    Raises ValueError for NaN, negative or too large loads, S not divisible by P, S < E, numbers of
    nodes and groups that do not divide (as in deepseek-ai/EPLB, "deepseek" takes one group on one
    node instead), too few slots on ranks of a speed above 0, and arguments that exclude each other.

    >>> result = plan(np.array([[8, 4, 2, 2]]), num_slots=6, num_ranks=2)
    >>> result.placement.slot_to_expert.tolist(), result.imbalance.tolist()
    ([[0, 1, 2, 0, 1, 3]], [0.0])
    """
    if not isinstance(load, jax.Array):
        load = np.asarray(load)
    if load.ndim not in (2, 3) or 0 in load.shape:
        raise ValueError(
            f"load has shape {load.shape}; expected [layers, experts] or "
            "[windows, layers, experts], none of them 0"
        )
    num_layers, num_experts = load.shape[-2:]
    check_sizes(num_experts, num_slots, num_ranks)
    if layer_ids is None:
        layer_ids = previous.layer_ids if isinstance(previous, Placement) else range(num_layers)
    ids = tuple(int(i) for i in layer_ids)
    check_layer_ids(ids, num_layers)
    if split not in ("even", "balanced"):
        raise ValueError(f"split {split!r} must be 'even' or 'balanced'")
    check_method(
        method,
        max_moves=max_moves is not None,
        cross_node_weight=cross_node_weight is not None,
        spread_replicas=spread_replicas,
        capacity=capacity is not None,
    )
    if method == "deepseek":
        num_nodes, num_groups = usable_groups(num_experts, num_ranks, num_nodes, num_groups)
    check_topology(num_experts, num_ranks, num_nodes, num_groups, spread_replicas)
    weight = check_cross_node_weight(cross_node_weight, num_nodes, num_groups, spread_replicas)
    if max_moves is not None and previous is None:
        raise ValueError("max_moves needs the placement in force: give previous")
    effort_of(effort)
    if not isinstance(load, Tracer):
        load = check_load(np.asarray(load), ids)
    if capacity is not None:
        nodes = num_nodes if num_groups > 1 else 1
        capacity = check_capacity(capacity, num_experts, num_slots, num_ranks, nodes)
    table = None
    if previous is not None:
        table = _table_in_force(previous, num_experts, num_slots, num_ranks, ids)
    limit = check_moves(max_moves, num_layers)
    sizes = Sizes(
        num_slots, num_ranks, split, effort, method, num_nodes, num_groups, spread_replicas
    )
    windows = jnp.asarray(load if load.ndim == 3 else load[None], jnp.float32)
    slots, *figures = _plan_layers(windows, table, limit, capacity, weight, sizes)
    return Plan(Placement(slots, num_experts, num_ranks, ids), *figures)


def frontier(
    load: Num[Array, "*windows L E"] | np.ndarray,
    previous: Placement,
    max_moves: Iterable[int | None],
    **options: Any,
) -> Iterator[Plan]:
    """Plans from `previous` with each of several limits of moves in turn; None is no limit.

    What more moves would buy. Takes the other arguments of `plan`. Where the plan for an earlier
    limit keeps to this one too and is expected to be better, a layer keeps it.

    >>> before = Placement.default(num_experts=4, num_ranks=2)
    >>> plans = frontier(np.array([[6, 6, 1, 1]]), before, [0, 2], effort="fast")
    >>> [(p.moves.tolist(), p.imbalance.round(2).tolist()) for p in plans]
    [([0], [0.7099999785423279]), ([2], [0.0])]
    """
    sizes = previous.num_slots, previous.num_ranks
    earlier = None
    for limit in max_moves:
        found = plan(load, *sizes, previous=previous, max_moves=limit, **options)
        # What replicas on one node or tokens off theirs are worth is not in the imbalance.
        if earlier is not None and not (
            options.get("spread_replicas") or options.get("cross_node_weight")
        ):
            found = _better_layers(found, earlier, limit)
        earlier = found
        yield found


def _better_layers(found: Plan, earlier: Plan, limit: int | None) -> Plan:
    keep = earlier.imbalance < found.imbalance
    if limit is not None and earlier.moves is not None:
        keep = keep & (earlier.moves <= limit)
    return choose_layers(keep, earlier, found)


def _table_in_force(
    previous: Placement | Int[Array, "L S"],
    num_experts: int,
    num_slots: int,
    num_ranks: int,
    layer_ids: tuple[int, ...],
) -> Int[Array, "L S"]:
    if not isinstance(previous, Placement):
        table = previous
    else:
        for name, theirs, ours in (
            ("experts", previous.num_experts, num_experts),
            ("ranks", previous.num_ranks, num_ranks),
            ("layers", previous.layer_ids, layer_ids),
        ):
            if theirs != ours:
                raise ValueError(f"previous is of {name} {theirs}, the plan of {name} {ours}")
        table = previous.slot_to_expert
    return check_previous(table, (len(layer_ids), num_slots), num_experts, layer_ids)


@functools.partial(jax.jit, static_argnames="sizes")
def _plan_layers(
    windows: Float[Array, "W L E"],
    previous: Int[Array, "L S"] | None,
    max_moves: Int[Array, "L"] | None,
    capacity: Float[Array, "P"] | None,
    cross_node_weight: Float[Array, ""] | None,
    sizes: Sizes,
):
    """The pure part of `plan`: slots, and the figures of `Plan` in their order.

    Any load gives a valid placement; NaN and negative ones count as none.
    """
    windows = jnp.where(windows > 0, jnp.minimum(windows, MAX_LOAD), 0.0)
    num_experts = windows.shape[2]
    # One window is scored as a single load, without the axis.
    load = windows if len(windows) > 1 else windows[0]

    def score(slots):
        each = score_balanced if sizes.split == "balanced" else score_even
        return each(load, slots, sizes.num_ranks, capacity)

    if previous is None:
        slots = _sort_within_ranks(from_load(windows, capacity, cross_node_weight, sizes), sizes)
        expected = score(slots)
    else:
        slots, expected = from_previous(
            windows, previous, max_moves, capacity, cross_node_weight, sizes, score
        )
    bound = lower_bound(
        load,
        num_slots=sizes.num_slots,
        num_ranks=sizes.num_ranks,
        split=sizes.split,
        capacity=capacity,
        simple=effort_of(sizes.effort).simple_bound,
    )
    moves = None if previous is None else count_moves(slots, previous, num_experts)
    cross = None
    if sizes.num_groups > 1:
        cross = cross_node_share(
            even_split(windows.sum(axis=0), slots, num_experts),
            slots,
            num_experts=num_experts,
            num_groups=sizes.num_groups,
            num_nodes=sizes.num_nodes,
        )
    # Rounding apart, the bound is never above what was reached.
    return slots, expected, jnp.minimum(bound, expected), moves, cross


def _sort_within_ranks(slots: Int[Array, "L S"], sizes: Sizes) -> Int[Array, "L S"]:
    if sizes.method == "deepseek":
        return slots
    by_rank = slots.reshape(slots.shape[0], sizes.num_ranks, -1)
    return jnp.sort(by_rank, axis=-1).reshape(slots.shape)
