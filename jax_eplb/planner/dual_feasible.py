"""Dual-feasible functions: which largest rank loads no placement under the even split can have.

Axes: L layers, E experts, S slots, P ranks, N slots per rank; A arguments, each one function.

A function g of replica sizes, as parts of a target load, is dual feasible here if any N sizes
whose sum is at most 1 have a g-sum of at most 1 (Lueker 1983, "Bin packing with items uniformly
distributed over intervals"; Fekete & Schepers 2001, "New classes of fast lower bounds for bin
packing problems"). If every rank keeps to the target, then some counts with Σ c_e = S have
Σ_e c_e g(w_e / (c_e target)) ≤ P. Each g used here has three steps, so an expert has three counts
worth a thought, the least ones that reach each step; with a price on slots (a Lagrange multiplier)
each expert chooses alone. Where even the cheapest choice costs more than P, the target is refuted.

As in `replicate`, the layers are the last axis of what the loops carry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Sizes at most this much above a step count as below it: a quotient's rounding is a tenth of it.
_BELOW = 1 - 1e-6
_LEAST_GAIN = 2e-4  # a target is tried only if it is this much above the bound so far
_PRICES = 12  # halvings of the price


class Arguments(NamedTuple):
    """One function an entry: above 1 - a, above a / room (the middle), and the rest, worth 0.

    `fraction`: a; where it is 0, a / room is instead the load of an expert: the one `order` places
    from the least. `kept`: the middle is worth its size, else all of it the same.
    """

    fraction: Float[np.ndarray, "A"]
    order: Float[np.ndarray, "A"]
    room: Float[np.ndarray, "A"]
    kept: Float[np.ndarray, "A"]


def choose_arguments(num_experts: int, slots_per_rank: int) -> Arguments:
    """The functions tried, in this order.

    Of pairs (N = 2), with a middle worth 1/2, they say that every replica above target - t needs a
    partner below t. No other functions do more for pairs, one t at a time, so there are more t.

    >>> choose_arguments(num_experts=4, slots_per_rank=2).order[:5].tolist()
    [0.0, 1.0, 2.0, 3.0, 0.0]
    >>> choose_arguments(num_experts=4, slots_per_rank=2).fraction[3:7].round(3)
    array([0.   , 0.5  , 0.475, 0.45 ], dtype=float32)
    """
    rows = []
    pairs = slots_per_rank == 2
    orders = np.geomspace(1, num_experts, 48 if pairs else 6).astype(int) - 1
    rooms = sorted({1, min(2, slots_per_rank - 1), slots_per_rank - 1})
    rows += [(0.0, order, room, 0) for order in np.unique(orders) for room in rooms]
    if pairs:
        rows += [(a, 0, 1, 0) for a in np.arange(0.5, 0.1, -0.025)]
    else:
        # Just above 1 / k, where one fewer of the middle fits.
        rows += [(1 / k + 1e-5 * (k > 2), 0, 1, 0) for k in range(2, 2 + min(slots_per_rank, 7))]
        rows += [(a, 0, 2, 0) for a in (0.5, 0.4, 0.3, 0.2)]
        rows += [(a, 0, 3, 0) for a in (0.5, 0.35)]
    rows += [(a, 0, 1, 1) for a in (0.4, 0.2)]
    return Arguments(*np.array(rows, np.float32).T)


class _Step(NamedTuple):
    """One target against one function, [1, L] each but the counts and sizes."""

    counts: tuple[Float[Array, "E L"], ...]  # the fewest replicas of at most 1, 1 - a, a / room
    worth: tuple[Float[Array, "1 L"], ...]  # of one replica above 1 - a, of one of the middle
    sizes: Float[Array, "E L"]  # what all of an expert's are worth more where the middle is kept


def _least_count(load: Float[Array, "E L"], size: Float[Array, "1 L"]) -> Float[Array, "E L"]:
    """The fewest replicas that make each at most `size`; never one too many by rounding."""
    return jnp.maximum(jnp.ceil(load * (_BELOW / size)), 1.0)


def _measure(load, target, argument: Arguments, least_load, slots_per_rank: int) -> _Step:
    """Counts and worths of a function at a target."""
    room, kept = argument.room, argument.kept
    # Just below that load, which then is of the middle: the largest a before that changes.
    below = room * least_load * (1 - 4e-6) / target
    a = jnp.where(argument.fraction > 0, argument.fraction, below)
    a = jnp.clip(a, 1e-6, 0.5)  # up to 1/2: no rank holds two above 1 - a
    # Of the middle, above a / room, at most this many fit a rank; beside a big one, room - 1.
    most = jnp.minimum(jnp.ceil(room / a * 1.000001) - 1, slots_per_rank)
    middle = 1 / most
    big = 1 - (jnp.minimum(room, slots_per_rank) - 1) * middle
    limits = jnp.ones_like(a), 1 - a, a / room
    counts = tuple(_least_count(load, target * limit) for limit in limits)
    middle = jnp.where(kept > 0, 0.0, middle)
    return _Step(counts, (big, middle), load * (kept / target))


def _refute(step: _Step, undecided, num_slots, num_ranks) -> Bool[Array, "1 L"]:
    """Whether some price of a slot makes even the cheapest counts worth more than the ranks."""
    worth, most = jnp.float32(num_ranks), jnp.float32(num_slots)
    # Each addition of the sum over experts rounds by at most 2^-24 of it.
    tolerance = (len(step.sizes) + 16) * 2.0**-24 * most

    def at(price):
        """Price p as p / (1 + p) in 0..1, all worths scaled with it: no sum exceeds that of c."""
        big, middle, small = step.counts
        rest = 1 - price
        costs = [(rest * step.worth[0] + price) * big, rest * step.sizes]
        costs[1] += (rest * step.worth[1] + price) * middle
        costs.append(price * small)
        least = jnp.minimum(jnp.minimum(costs[0], costs[1]), costs[2])
        count = jnp.where(costs[2] <= least, small, jnp.where(costs[1] <= least, middle, big))
        return least.sum(0, keepdims=True), count.sum(0, keepdims=True)

    def halve(state):
        i, price, undecided, refuted = state
        least, count = at(price)
        excess = least - price * most - (1 - price) * worth
        found = undecided & (excess > tolerance)
        # Counts that fit, and are worth no more than the ranks: no price can refute.
        fits = (count <= most) & (least - price * count <= (1 - price) * worth)
        step = 0.5 ** (i.astype(jnp.float32) + 2)
        price = price + jnp.where(count > most, step, -step)
        return i + 1, price, undecided & ~found & ~fits, refuted | found

    start = jnp.int32(0), jnp.full_like(undecided, 0.5, jnp.float32), undecided, undecided & False
    return jax.lax.while_loop(lambda state: (state[0] < _PRICES) & state[2].any(), halve, start)[3]


def raise_by_functions(
    load: Float[Array, "L E"],
    bound: Float[Array, "L"],
    *,
    num_slots: Float[Array, ""],
    num_ranks: Float[Array, ""],
    slots_per_rank: int,
) -> Float[Array, "L"]:
    """The largest target refuted, or the bound given where none above it is.

    Loads are scaled to a mean of 1 a rank. A refuted target stays refuted under lower ones, so each
    function in turn climbs from the bound so far, in strides that double until one fails and are
    halved from then on; layers it cannot lift stop it at once.
    """
    arguments = choose_arguments(load.shape[1], slots_per_rank)
    ascending = jnp.sort(load, axis=1).T[arguments.order.astype(np.int32)]  # [A, L]
    load = load.T
    tried = jax.tree.map(jnp.asarray, arguments)

    def climb(k, bound):
        argument = jax.tree.map(lambda field: field[k], tried)

        def stride(state):
            bound, width, climbing, doubling = state
            target = bound * (1 + width)
            step = _measure(load, target, argument, ascending[k][None], slots_per_rank)
            refuted = _refute(step, climbing, num_slots, num_ranks)
            bound = jnp.where(refuted, target, bound)
            doubling &= refuted
            width = jnp.where(doubling, 2 * width, width / 2)
            climbing &= width >= jnp.where(bound > start[0], _LEAST_GAIN / 8, _LEAST_GAIN)
            return bound, width, climbing, doubling

        everywhere = jnp.full_like(bound, True, bool)
        start = bound, jnp.full_like(bound, _LEAST_GAIN), everywhere, everywhere
        return jax.lax.while_loop(lambda state: state[2].any(), stride, start)[0]

    return jax.lax.fori_loop(0, len(arguments.order), climb, bound[None])[0]
