"""What to move after an iteration: a pure function of the state, the settings and the costs.

Axes: W iterations, L layers, K layers looked at, E experts, S slots, P ranks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_eplb.online.config import BalancerConfig
from jax_eplb.online.state import (
    BalancerState,
    choose_layers,
    is_balanced_enough,
    looks_after,
    must_change,
    note_looks,
    pass_over_quiet,
    total_speed,
)
from jax_eplb.online.worth import Costs, seconds_saved, seconds_to_move, worth_moving
from jax_eplb.planner import Plan, plan
from jax_eplb.planner.score import score_balanced, score_even

# The planner leaves a placement as it is where less imbalance than this could be gained, so there
# is no need to ask it.
_LEAST_IMBALANCE = 0.01
# More iterations than these are added up in groups: the planner draws no more scenarios.
_MOST_WINDOWS = 32


class Served(NamedTuple):
    """The sizes that plans are for, and how the layer divides an expert's tokens."""

    num_experts: int
    num_ranks: int
    layer_ids: tuple[int, ...]
    split: str  # "even" or "balanced"


class Decision(NamedTuple):
    """What a look at some layers came to. Arrays have one entry for each layer that changes."""

    iteration: int  # of the counts that it rests on
    looked_at: tuple[int, ...]  # positions of layers; empty where all is well
    layers: np.ndarray  # int[k]: those that change
    rows: np.ndarray  # int32[k, S]: their new placements
    moves: np.ndarray  # int[k]
    imbalance_before: np.ndarray  # float64[k], of the load planned for
    imbalance_expected: np.ndarray
    seconds_saved: np.ndarray  # float64[k], per iteration; 0 where costs are not known
    seconds_to_move: np.ndarray


def decide(
    state: BalancerState, config: BalancerConfig, served: Served, costs: Costs | None
) -> tuple[BalancerState, Decision | None]:
    """The state with what was decided, and the decision; None where it was no time to look.

    Depends on nothing but its arguments, so every process decides alike. Of the layers looked at,
    those change whose plan, made from the present placement for the split in use, is worth its
    moves; those that gain most stand first. A layer with experts on ranks of speed 0 changes
    whatever it costs, before all others. Raises ValueError where there is a horizon and no
    costs, or the load cannot be planned for.
    """
    if not looks_after(state.iteration, config):
        return state, None
    good = is_balanced_enough(state, config)
    state = state._replace(balancedness=0.0, since_look=0)
    if good:
        return state, _nothing(state, ())
    if config.horizon is not None and costs is None:
        raise ValueError(f"a horizon of {config.horizon} iterations needs costs to weigh; none")
    layers, state = choose_layers(state, config)
    layers, state = pass_over_quiet(state, layers, config)
    if not layers:
        return state, _nothing(state, ())
    decision = _plan_for(state, layers, config, served, costs)
    state = note_looks(state, layers, decision.layers)
    table = state.table.copy()
    table[decision.layers] = decision.rows
    return state._replace(table=table), decision


def _plan_for(
    state: BalancerState,
    layers: tuple[int, ...],
    config: BalancerConfig,
    served: Served,
    costs: Costs | None,
) -> Decision:
    """Which of these layers change, and how."""
    # Always K layers, so that one program does for all groups.
    count = min(config.layer_updates_per_iter, len(state.table))
    index = np.array((layers + layers[:1] * count)[:count])
    load, tokens = _load_of(state, index)
    per_rank = tokens / total_speed(state)
    present = state.table[index]
    before = _imbalance(load, present, state.capacity, served)
    # What could be gained at most: there is no need to ask the planner where that is too little.
    hopeful = before >= _LEAST_IMBALANCE
    if config.horizon is not None and costs is not None:
        most_saved = seconds_saved(before, np.zeros(count), per_rank, costs)
        hopeful &= worth_moving(most_saved, seconds_to_move(np.ones(count), costs), config.horizon)
    urgent = must_change(state)[index]
    hopeful |= urgent
    if not hopeful.any():
        return _nothing(state, layers)
    ids = _ids_for(index, layers, served)
    found = _plan(load, present, state.capacity, ids, config, served)
    expected = np.asarray(found.imbalance, np.float64)
    moves = np.asarray(found.moves)
    saved, cost = np.zeros(count), np.zeros(count)
    if costs is not None:
        saved = seconds_saved(before, expected, per_rank, costs)
        cost = seconds_to_move(moves, costs)
    worth = (moves > 0) & (expected < before)
    if config.horizon is not None:
        worth &= worth_moving(saved, cost, config.horizon)
    worth |= urgent
    worth[len(layers) :] = False
    order = np.lexsort((-(before - expected) * per_rank, ~urgent))
    chosen = order[worth[order]]
    return Decision(
        iteration=state.iteration,
        looked_at=layers,
        layers=index[chosen],
        rows=np.asarray(found.placement.slot_to_expert)[chosen],
        moves=moves[chosen],
        imbalance_before=before[chosen],
        imbalance_expected=expected[chosen],
        seconds_saved=saved[chosen],
        seconds_to_move=cost[chosen],
    )


def prepare_decisions(state: BalancerState, config: BalancerConfig, served: Served) -> None:
    """Compile what `decide` will run, by running it on even loads; changes nothing."""
    if not config.layer_updates_per_iter:
        return
    count = min(config.layer_updates_per_iter, len(state.table))
    index = np.zeros(count, int)
    load, _ = _load_of(state._replace(load=np.ones_like(state.load), weight=1.0), index)
    present = state.table[index]
    _imbalance(load, present, state.capacity, served)
    found = _plan(load, present, state.capacity, tuple(range(count)), config, served)
    found.imbalance.block_until_ready()


def _plan(
    load: np.ndarray,
    present: np.ndarray,
    capacity: np.ndarray,
    layer_ids: tuple[int, ...],
    config: BalancerConfig,
    served: Served,
) -> Plan:
    num_slots = present.shape[1]
    return plan(
        load,
        num_slots,
        served.num_ranks,
        previous=jnp.asarray(present),
        max_moves=num_slots if config.max_moves is None else config.max_moves,
        split=served.split,
        effort=config.effort,
        capacity=jnp.asarray(capacity),  # also where all are alike, so that one program does
        layer_ids=layer_ids,
    )


def _nothing(state: BalancerState, looked_at: tuple[int, ...]) -> Decision:
    none, whole = np.zeros(0), np.zeros(0, int)
    rows = np.zeros((0, state.table.shape[1]), np.int32)
    return Decision(state.iteration, looked_at, whole, rows, whole, none, none, none, none)


def _load_of(state: BalancerState, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to plan for, [K, E] or [windows, K, E], and the tokens of an iteration, float64[K]."""
    if not len(state.window):
        load = state.load[index]
        return load, load.sum(axis=-1, dtype=np.float64) / max(state.weight, 1.0)
    window = state.window[:, index]
    seen = min(max(state.iteration, 1), len(window))
    tokens = window.sum(axis=(0, -1), dtype=np.float64) / seen
    together = -(-len(window) // _MOST_WINDOWS)
    if together > 1:
        # The oldest group may be smaller; filled up with nothing, it weighs less.
        missing = -len(window) % together
        window = np.concatenate([np.zeros((missing, *window.shape[1:]), np.float32), window])
        window = window.reshape(-1, together, *window.shape[1:]).sum(axis=1)
    return window, tokens


def _imbalance(
    load: np.ndarray, table: np.ndarray, capacity: np.ndarray, served: Served
) -> np.ndarray:
    score = _scorer(served.split)
    # Of numpy arrays, which `jit` takes in less time than it takes to make them JAX's.
    found = score(load, table, served.num_ranks, capacity)
    return np.asarray(found, np.float64)


@functools.lru_cache
def _scorer(split: str):
    return jax.jit(score_balanced if split == "balanced" else score_even, static_argnums=2)


def _ids_for(index: np.ndarray, layers: tuple[int, ...], served: Served) -> tuple[int, ...]:
    """The layers' own numbers, for errors; those that only fill up get numbers below 0."""
    ids = [served.layer_ids[int(i)] for i in index[: len(layers)]]
    return tuple(ids + [-1 - i for i in range(len(index) - len(layers))])
