"""What the balancer knows, as a value, and how an iteration changes it.

Axes: W iterations kept, L layers, E experts, S slots, P ranks. All on the host, in numpy, so that
every process that sees the same counts has the same state, bit for bit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_eplb import metrics
from jax_eplb.online.config import BalancerConfig
from jax_eplb.placement import Placement

# A look that found nothing is not repeated in the next 1, 2, 4, ... turns of the layer, unless its
# measured imbalance has grown by this part and this much.
_WORSE_BY, _WORSE_AT_LEAST = 0.1, 0.005
# The load has changed where imbalance jumped, by this at least, in so many iterations in a row.
_LEAST_JUMP, _JUMPS = 0.02, 3
_KEPT = ("iteration", "load", "weight", "window", "usual")


class BalancerState(NamedTuple):
    """After `iteration` iterations; nothing else is needed to go on from there."""

    iteration: int
    load: np.ndarray  # float32[L, E], fading
    weight: float  # what an iteration of one token in each place would have left in `load`
    window: np.ndarray  # float32[W, L, E], the newest last; W = 0 where the load fades
    table: np.ndarray  # int32[L, S]: the placement decided on, in force or soon
    capacity: np.ndarray  # float32[P]: the ranks' relative speeds; 0 holds nothing
    group: int  # whose turn it is, of the groups that layers are divided into
    waiting: np.ndarray  # bool[L]: not yet looked at in this round
    # float32[L], fading: tokens that the fullest rank had above the mean, as one of speed 1 counts.
    excess: np.ndarray
    fruitless: np.ndarray  # int32[L]: looks in a row that found nothing worth moving
    passed: np.ndarray  # int32[L]: turns passed over since the last of them
    calm: np.ndarray  # float32[L]: `recent_imbalance` at the last of them
    usual: float  # imbalance, mean over the layers, fading; infinite where none was seen
    jumps: int  # iterations in a row in which it was far above that
    imbalance: np.ndarray  # float64[L], of the ranks' times in the last iteration
    balancedness: float  # sum over the iterations since the last look
    since_look: int


def initial_state(placement: Placement, config: BalancerConfig) -> BalancerState:
    """Before the first iteration, with the placement in force."""
    table = np.asarray(placement.slot_to_expert, np.int32)
    capacity = np.ones(placement.num_ranks) if config.capacity is None else config.capacity
    num_layers = len(table)
    shape = (num_layers, placement.num_experts)
    return BalancerState(
        iteration=0,
        load=np.zeros(shape, np.float32),
        weight=0.0,
        window=np.zeros((config.window_size or 0, *shape), np.float32),
        table=table,
        capacity=np.asarray(capacity, np.float32),
        group=0,
        waiting=np.ones(num_layers, bool),
        excess=np.zeros(num_layers, np.float32),
        fruitless=np.zeros(num_layers, np.int32),
        passed=np.zeros(num_layers, np.int32),
        calm=np.zeros(num_layers, np.float32),
        usual=math.inf,
        jumps=0,
        imbalance=np.zeros(num_layers),
        balancedness=0.0,
        since_look=0,
    )


def kept_load(state: BalancerState) -> dict[str, np.ndarray]:
    """What is worth keeping when a run ends: no rank or slot is in it, so any mesh can go on."""
    return {name: np.asarray(getattr(state, name)) for name in _KEPT}


def with_load(state: BalancerState, kept: Mapping[str, np.ndarray]) -> BalancerState:
    """An initial state that goes on from what `kept_load` gave.

    Raises ValueError where that is of another model, or of another window.
    """
    missing = [name for name in _KEPT if name not in kept]
    if missing:
        raise ValueError(f"the load kept has no {missing[0]!r}; it is not a balancer's")
    for name in _KEPT:
        have, need = np.shape(kept[name]), np.shape(getattr(state, name))
        if have != need:
            hint = "use the same window_size" if name == "window" else "it is of another model"
            raise ValueError(f"the load kept has a {name} of shape {have}, not {need}; {hint}")
    return state._replace(
        iteration=int(kept["iteration"]),
        load=np.asarray(kept["load"], np.float32),
        weight=float(kept["weight"]),
        window=np.asarray(kept["window"], np.float32),
        usual=float(kept["usual"]),
    )


def observe(
    state: BalancerState,
    expert_tokens: np.ndarray,
    rank_tokens: np.ndarray,
    config: BalancerConfig,
    layer_ids: tuple[int, ...],
) -> BalancerState:
    """The state after one more iteration: counts by expert [L, E], all ranks summed, and by rank.

    `load <- decay * load + counts`. Raises ValueError for counts of other sizes, or that are
    negative or not finite.
    """
    counts = np.asarray(expert_tokens)
    if counts.shape != state.load.shape or rank_tokens.shape[:1] != counts.shape[:1]:
        raise ValueError(
            f"iteration {state.iteration}: counts of shapes {counts.shape} (by expert) and "
            f"{rank_tokens.shape} (by rank); expected {state.load.shape} and "
            f"[{len(state.load)} layers, ranks]: the counts are of another model"
        )
    if not (counts.min() >= 0 and counts.max() < math.inf):  # false for NaN, too
        wrong = ~(np.isfinite(counts) & (counts >= 0))
        layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"iteration {state.iteration}, layer {layer_ids[layer]}, expert {expert}: a count of "
            f"{counts[layer, expert]}; expected 0 or more. The load before it is kept"
        )
    counts = counts.astype(np.float32)
    decay = np.float32(config.decay)
    imbalance = metrics.imbalance(rank_tokens, state.capacity)
    computed = rank_tokens[:, state.capacity > 0].sum(axis=1)
    excess = imbalance * computed / total_speed(state)
    # Iterations without a token say nothing of balance.
    seen = bool(counts.any())
    window, usual, jumps = state.window, state.usual, state.jumps
    if len(window):
        window = np.concatenate([window[1:], counts[None]])
        now, factor = float(imbalance.mean()), config.change_factor
        jumped = factor is not None and now > factor * usual + _LEAST_JUMP
        jumps = jumps + 1 if jumped else 0
        if jumps == _JUMPS:
            window[:-_JUMPS] = 0
        if seen:
            fading = config.decay * usual + (1 - config.decay) * now
            usual = now if math.isinf(usual) else fading
    even = float(metrics.balancedness_from(imbalance))
    return state._replace(
        iteration=state.iteration + 1,
        load=decay * state.load + counts,
        weight=config.decay * state.weight + 1,
        window=window,
        usual=usual,
        jumps=jumps,
        excess=decay * state.excess + excess.astype(np.float32),
        imbalance=imbalance,
        balancedness=state.balancedness + (even if seen else 0.0),
        since_look=state.since_look + seen,
    )


def with_capacity(state: BalancerState, capacity: np.ndarray) -> BalancerState:
    """The state after ranks became slower or faster, are gone (0) or came back.

    What was found before says nothing any more: neither how uneven the layers usually are, nor
    which of them are not worth a look.
    """
    return state._replace(
        capacity=np.asarray(capacity, np.float32),
        fruitless=np.zeros_like(state.fruitless),
        passed=np.zeros_like(state.passed),
        usual=math.inf,
        jumps=0,
    )


def total_speed(state: BalancerState) -> float:
    """How many ranks of speed 1 the ranks are worth."""
    return float(state.capacity.sum(dtype=np.float64))


def layers_on(state: BalancerState, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """bool[L]: the layers that have experts on any of these ranks."""
    num_experts = state.load.shape[1]
    filled = state.table.reshape(len(state.table), len(state.capacity), -1) < num_experts
    return filled[:, ranks].any(axis=(1, 2))


def must_change(state: BalancerState) -> np.ndarray:
    """bool[L]: the layers that have experts on ranks of speed 0."""
    empty = np.flatnonzero(state.capacity == 0)
    return layers_on(state, empty) if empty.size else np.zeros(len(state.table), bool)


def looks_after(iterations: int, config: BalancerConfig) -> bool:
    """Whether layers are to be looked at after so many iterations.

    >>> config = BalancerConfig(layer_updates_per_iter=1, warm_up_iterations=2, step_interval=3)
    >>> [n for n in range(12) if looks_after(n, config)]
    [5, 8, 11]
    """
    since = iterations - config.warm_up_iterations
    return config.layer_updates_per_iter > 0 and since > 0 and since % config.step_interval == 0


def is_balanced_enough(state: BalancerState, config: BalancerConfig) -> bool:
    """Whether `min_balancedness` says that there is nothing to do."""
    if config.min_balancedness is None or must_change(state).any():
        return False
    return not state.since_look or state.balancedness / state.since_look >= config.min_balancedness


def choose_layers(
    state: BalancerState, config: BalancerConfig
) -> tuple[tuple[int, ...], BalancerState]:
    """Which layers' turn it is, at most K, and the state in which they had it.

    As in TensorRT-LLM the L layers are dealt to ceil(L / K) groups, whose turn it is one after the
    other. With a horizon each round begins with the layers whose fullest ranks lately had most
    above the mean, since there is most to gain. Layers that have experts on ranks of speed 0 come
    before all others, and take nobody's turn.
    """
    num_layers = len(state.table)
    most = min(config.layer_updates_per_iter, num_layers)
    urgent = np.flatnonzero(must_change(state))
    if urgent.size:
        return tuple(int(layer) for layer in urgent[:most]), state
    num_groups = -(-num_layers // most)
    if config.horizon is None:
        chosen = tuple(range(state.group, num_layers, num_groups))
        return chosen, state._replace(group=(state.group + 1) % num_groups)
    order = np.argsort(np.where(state.waiting, -state.excess, np.inf), kind="stable")
    count = min(most, int(state.waiting.sum()))
    chosen = tuple(sorted(int(layer) for layer in order[:count]))
    waiting = state.waiting.copy()
    waiting[list(chosen)] = False
    if not waiting.any():
        waiting[:] = True
    return chosen, state._replace(waiting=waiting)


def recent_imbalance(state: BalancerState) -> np.ndarray:
    """Measured, float32[L], fading: how far the fullest ranks were above the mean.

    Each iteration counts by its tokens.
    """
    mean = state.load.sum(axis=1) / np.float32(total_speed(state))
    return state.excess / np.where(mean > 0, mean, np.float32(1))


def pass_over_quiet(
    state: BalancerState, layers: tuple[int, ...], config: BalancerConfig
) -> tuple[tuple[int, ...], BalancerState]:
    """Which of the layers whose turn it is are worth a plan, and the state afterwards.

    Planning costs time, and where nothing was found lately and nothing has become worse, nothing
    will be found now: not before the load planned for has changed by a good part.
    """
    now = recent_imbalance(state)
    memory = config.window_size or 1 / (1 - config.decay)
    num_groups = -(-len(state.table) // config.layer_updates_per_iter)
    most = int(memory / (2 * num_groups * config.step_interval))
    limit = np.minimum(2 ** np.maximum(state.fruitless - 1, 0), most)
    worse = now > state.calm * np.float32(1 + _WORSE_BY) + np.float32(_WORSE_AT_LEAST)
    look = (state.fruitless == 0) | (state.passed >= limit) | worse | must_change(state)
    passed = state.passed.copy()
    turn = np.array(layers, int)
    passed[turn] = np.where(look[turn], 0, passed[turn] + 1)
    return tuple(int(i) for i in turn[look[turn]]), state._replace(passed=passed)


def note_looks(
    state: BalancerState, looked_at: tuple[int, ...], changed: np.ndarray
) -> BalancerState:
    """Remember which looks found nothing worth moving."""
    fruitless, calm = state.fruitless.copy(), state.calm.copy()
    turn = np.array(looked_at, int)
    fruitless[turn] = np.where(np.isin(turn, changed), 0, np.minimum(fruitless[turn] + 1, 30))
    calm[turn] = recent_imbalance(state)[turn]
    return state._replace(fruitless=fruitless, calm=calm)
