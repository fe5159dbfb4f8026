"""Effort: how long a plan may take, as named levels.

Axes: L layers, E experts, S slots, P ranks.
"""

from typing import NamedTuple


class Effort(NamedTuple):
    """How much of everything is tried."""

    # Ways to replicate: offset, and the part of the spare slots held back for small replicas.
    ways: tuple[tuple[float, float], ...]
    # Rounds of swaps for each way. So many of each layer's best go on, with rounds of swaps and
    # replacements; the best of those is kept.
    swap_rounds: int
    finalists: int
    change_rounds: int
    # Moved replicas tried where a rank has two slots (see `improve_pairs`, `pair_tries_for`).
    pair_tries: int
    # Windows: scenarios at least, ways to replicate, as powers of the mean over scenarios, and
    # rounds for each (see `rounds_for_windows`).
    scenarios: int
    powers: tuple[float, ...]
    window_rounds: int
    # Rounds for the balanced split (see `rounds_for_balanced`).
    balanced_rounds: int
    # No more than the mean and the largest replica in the lower bound.
    simple_bound: bool = False


EFFORTS = {
    # One way and no windows: they are added up.
    "fast": Effort(
        ways=((-0.3, 0.0),),
        swap_rounds=4,
        finalists=1,
        change_rounds=0,
        pair_tries=2,
        scenarios=0,
        powers=(),
        window_rounds=0,
        balanced_rounds=2,
        simple_bound=True,
    ),
    "default": Effort(
        ways=((0.0, 0.0), (-0.4, 0.0), (-0.7, 0.0), (-0.8, 0.0), (-0.5, 0.25)),
        swap_rounds=12,
        finalists=1,
        change_rounds=32,
        pair_tries=32,
        scenarios=64,
        powers=(1.0, 2.0, 6.0),
        window_rounds=100,
        balanced_rounds=8,
    ),
    "best": Effort(
        ways=(
            (0.0, 0.0),
            (-0.15, 0.0),
            (-0.3, 0.0),
            (-0.5, 0.0),
            (-0.6, 0.0),
            (-0.8, 0.0),
            (-0.95, 0.0),
            (-0.15, 0.12),
            (-0.4, 0.12),
            (-0.6, 0.12),
            (-0.8, 0.12),
            (-0.7, 0.06),
            (-0.3, 0.25),
            (-0.5, 0.25),
        ),
        # Fewer than by default, since more candidates go on.
        swap_rounds=6,
        finalists=3,
        change_rounds=60,
        pair_tries=800,
        scenarios=256,
        powers=(1.0, 1.5, 2.0, 3.0, 6.0),
        window_rounds=100,
        balanced_rounds=20,
    ),
}

# What efforts are made for; smaller problems get more in the same time.
_LAYERS, _SLOTS, _RANKS = 58, 288, 36


def ways_for(effort: Effort, num_layers: int, num_slots: int) -> tuple[tuple[float, float], ...]:
    """The ways to replicate that are tried: with very many slots, the first ones only.

    >>> [len(ways_for(EFFORTS["default"], 58, num_slots)) for num_slots in (288, 640, 2000)]
    [5, 5, 2]
    """
    size = num_layers * num_slots / (_LAYERS * _SLOTS)
    return effort.ways[: max(int(3 * len(effort.ways) / size), 2)]


def pair_tries_for(effort: Effort, num_slots: int) -> int:
    """How many moved replicas are tried: each takes the longer, the more slots there are.

    >>> [pair_tries_for(EFFORTS["best"], num_slots) for num_slots in (96, 320, 2000)]
    [800, 800, 20]
    """
    size = max(num_slots / 320, 1.0)  # of 256 experts on 160 ranks
    return int(effort.pair_tries / size**2)


def finalists_for(effort: Effort, num_layers: int, num_slots: int) -> int:
    """How many candidates of each layer go on.

    >>> [finalists_for(EFFORTS["best"], 58, num_slots) for num_slots in (96, 144, 288)]
    [14, 12, 3]
    """
    times = _LAYERS * _SLOTS // (num_layers * num_slots)
    return min(effort.finalists * max(times, 1) ** 2, len(effort.ways))


def rounds_for_windows(effort: Effort, num_ranks: int) -> int:
    """How many rounds the search over windows gets; with few ranks, more would only over-fit.

    >>> [rounds_for_windows(EFFORTS["best"], num_ranks) for num_ranks in (8, 16, 32, 1000)]
    [77, 100, 144, 200]
    """
    return min(effort.window_rounds * (20 + num_ranks) // _RANKS, 2 * effort.window_rounds)


def rounds_for_balanced(effort: Effort, num_layers: int, num_slots: int, num_ranks: int) -> int:
    """How many rounds the search for the balanced split gets.

    >>> rounds_for_balanced(EFFORTS["best"], num_layers=24, num_slots=40, num_ranks=8)
    160
    """
    times = _LAYERS * _SLOTS * _RANKS // (num_layers * num_slots * num_ranks)
    return effort.balanced_rounds * min(max(times, 1), 8)


def effort_of(name: str) -> Effort:
    """Raises ValueError for an unknown name."""
    if name not in EFFORTS:
        raise ValueError(f"effort {name!r} must be one of: {', '.join(EFFORTS)}")
    return EFFORTS[name]
