"""Pair functions: refute targets for ranks of two slots by mixtures of dual-feasible functions.

Axes: L layers, E experts, S slots, P ranks; G functions, Q cells of sizes. A size is a replica's
load as a part of the target. As in `replicate`, the layers are the last axis within the loop.

Where two sizes have a sum below 1 and one of them is at least 1 - a, the other is below a. So the
step function 1 from 1 - a, 1/2 from a, else 0 is dual feasible (see `dual_feasible`), and so is any
mean of such functions, of the constant 1/2, whose inequality is Σ c_e ≤ S, and of the size itself.
If some counts met the inequality of each function, and not only of one, sorted replicas could be
paired, the largest with the smallest. So mixtures refute all that functions can refute of pairs.

Which mixture refutes a target is a game: against a mixture each expert chooses the count that
makes the least of it alone; against the counts the functions that exceed P most gain weight, by
predictive regret matching (Farina, Kroer & Sandholm 2021, "Faster game solving via predictive
Blackwell approachability"). However the game is played, what it refutes is refuted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Cells on either side of 1/2. Their edges are j² / 2 / HALF² and the mirror images of these: fine
# near 0 and 1, where the load of one tiny expert decides what fits beside a large one.
_HALF = 128
_ROUNDS = 100
_FIRST_STEP, _LAST_STEP = 1e-3, 2e-4  # above the target so far, relative
_PATIENCE = 20  # rounds without a refutation after which the step is halved
_EXACT = 4  # replica counts looked at one by one; larger ones in ranges
# Float32 moves a size, or the edge of a cell, by less than this part of itself. If sizes are in
# truth a little smaller than they were taken for, they are right for a target as much smaller.
_SLACK = 1e-6


class _State(NamedTuple):
    """The game after some rounds."""

    round: Int[Array, ""]
    target: Float[Array, "L"]  # the largest that is refuted
    step: Float[Array, "L"]  # what is tried next; below _LAST_STEP: given up
    failures: Int[Array, "L"]  # rounds since the last refutation or change of the step
    regret: Float[Array, "G L"]
    gain: Float[Array, "G L"]  # what each function gained on the mixture in the last round


def raise_by_mixtures(
    load: Float[Array, "L E"],
    bound: Float[Array, "L"],
    *,
    num_ranks: Float[Array, ""],
    active: Bool[Array, ""],
    divisible: bool,
) -> Float[Array, "L"]:
    """The largest target refuted for ranks of two slots, or the bound where none above it is.

    Loads are scaled to a mean of 1 a rank. `divisible`: an expert's replicas divide its tokens
    freely. Then those of one with c ≥ 2 are worth at least c·h(w / c) with h the largest convex
    function below the step function; an expert with one replica keeps its size. Only if `active`.
    """
    functions = _functions(divisible)  # [G, Q], Q twice as large where divisible
    load = load.T
    num_layers = load.shape[1]
    layers = jnp.arange(num_layers, dtype=jnp.int32)[None]
    volume = load.sum(0)  # P, where there is any
    # Each addition of a sum over functions or experts rounds by at most 2^-24 of it.
    sum_slack = (len(load) + 3 * len(functions) + 16) * 2.0**-24

    def worth(count, cell, target):
        """Of all functions at some counts, as parts of P: [G, L]."""
        held = jnp.zeros((functions.shape[1], num_layers), jnp.float32)
        held = held.at[cell, jnp.broadcast_to(layers, cell.shape)].add(count)
        worth = jnp.dot(functions, held, precision="highest")
        return worth.at[-1].add(volume / target) / num_ranks

    def choose(mixture, target):
        """The counts for which the mixture is worth least, and that worth for each expert."""
        values = jnp.dot(functions.T, mixture, precision="highest")  # [Q, L]
        count, cell = _candidates(load / target[None], divisible)  # [J, E, L]
        value = jnp.take_along_axis(values, cell.reshape(-1, num_layers), axis=0)
        value = count * value.reshape(count.shape)
        least = value.min(0)
        chosen = jnp.where(value == least[None], count, jnp.inf).min(0)
        cell = jnp.where(count == chosen[None], cell, 0).max(0)
        return least, chosen, cell

    def play(state: _State) -> _State:
        weight = jnp.maximum(state.regret + state.gain, 0.0)
        total = weight.sum(0, keepdims=True)
        even = jnp.full_like(weight, 1 / len(weight))
        mixture = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), even)
        target = state.target * (1 + state.step)
        least, count, cell = choose(mixture, target)
        each = worth(count, cell, target)
        gain = each - (mixture * each).sum(0, keepdims=True)

        whole = least.sum(0) + mixture[-1] * volume / target
        refuted = (whole > num_ranks * (1 + sum_slack)) & (state.step >= _LAST_STEP)
        failures = jnp.where(refuted, 0, state.failures + 1)
        # No mixture refutes what these counts allow all functions.
        stuck = (each.max(0) <= 1) | (failures >= _PATIENCE)
        factor = jnp.where(refuted, 1.5, jnp.where(stuck, 0.5, 1.0))
        return _State(
            state.round + 1,
            jnp.where(refuted, target, state.target),
            state.step * factor,
            jnp.where(stuck, 0, failures),
            jnp.maximum(state.regret + gain, 0.0),
            gain,
        )

    # Nothing is to gain where the counts that make the largest replica least suit all functions.
    nearest = bound * (1 + _LAST_STEP)
    count = _fewest(load / bound[None])
    cell = _cell(load / nearest[None] / count, count, divisible)
    open_to = active & (worth(count, cell, nearest).max(0) > 1)
    nothing = jnp.zeros((functions.shape[0], num_layers), jnp.float32)
    step = jnp.where(open_to, jnp.float32(_FIRST_STEP), 0.0)
    start = _State(jnp.int32(0), bound, step, jnp.zeros_like(step, jnp.int32), nothing, nothing)

    def unfinished(state):
        return (state.round < _ROUNDS) & (state.step >= _LAST_STEP).any()

    found = jax.lax.while_loop(unfinished, play, start).target
    return jnp.maximum(jnp.where(found > bound, found * (1 - 2 * _SLACK), bound), bound)


def _fewest(size):
    """Replicas that an expert of this size, with one, needs at least; none too many by rounding."""
    return jnp.maximum(jnp.ceil(size * (1 - _SLACK)), 1.0)


def _candidates(size, divisible: bool):
    """Counts and cells, [J, E, L] each: none of an expert's counts is worth less than all J."""
    fewest = _fewest(size)
    counts = [fewest + more for more in range(_EXACT + 1)]
    counts += [jnp.ceil(1.5 * counts[-1]), jnp.ceil(2.5 * counts[-1])]
    # A range of counts is worth no less than its first, of replicas as small as after its last; of
    # the last range, of none at all.
    shares = [*counts[:_EXACT], *counts[_EXACT + 1 :], jnp.full_like(size, jnp.inf)]
    count, share = jnp.stack(counts), jnp.stack(shares)
    return count, _cell(size[None] / share, count, divisible)


def _cell(size, count, divisible: bool):
    """The number of the cell with a size; for more than one replica, those of a second table."""
    below = jnp.floor(_HALF * jnp.sqrt(2 * jnp.minimum(size, 0.5)))
    above = 2 * _HALF - jnp.ceil(_HALF * jnp.sqrt(2 * jnp.clip(1 - size, 0.0, 0.5)))
    cell = jnp.clip(jnp.where(size < 0.5, below, above), 0, 2 * _HALF - 1).astype(jnp.int32)
    return cell + jnp.where(count > 1, 2 * _HALF, 0) if divisible else cell


def _functions(divisible: bool) -> Float[Array, "G Q"]:
    """Each function at the lower edges of the cells, where it is least in the cell.

    The first is the constant. The last, the size itself, is 0 here: its sum is always P / target.
    """
    edge = (np.arange(_HALF + 1) / _HALF) ** 2 / 2
    size = np.concatenate([edge, 1 - edge[-2:0:-1]])
    a = edge[1:, None]
    steps = np.where(size >= 1 - a, 1.0, np.where(size >= a, 0.5, 0.0))
    tables = [steps]
    if divisible:
        # The convex function through (a, 0), (1 - a, 1/2) and (1, 1), or past the middle one.
        gentle = (size - a) / np.maximum(2 - 4 * a, 1e-9)
        steep = (size - 1 + 2 * a) / (2 * a)
        bent = np.where(a <= 1 / 3, np.maximum(gentle, steep), (size - a) / (1 - a))
        tables.append(np.maximum(bent, 0.0))
    whole = np.concatenate(tables, axis=1)
    flat = np.full((1, whole.shape[1]), 0.5)
    return jnp.asarray(np.concatenate([flat, whole, 0 * flat]), jnp.float32)
