"""Effort: how long a plan may take, as named levels.

Axes: S slots, E experts.
"""

from typing import NamedTuple


class Effort(NamedTuple):
    """How much of everything is tried."""

    # Ways to replicate: offset, and the part of the spare slots held back for small replicas. The
    # best plan of each layer is kept.
    ways: tuple[tuple[float, float], ...]
    # Rounds of swaps for each way, then of swaps and replacements for the best.
    swap_rounds: int
    change_rounds: int
    # Moved replicas tried where a rank has two slots (see `improve_pairs`).
    pair_tries: int
    # Windows: ways to replicate, as powers of the mean over scenarios, and rounds for each.
    powers: tuple[float, ...]
    window_rounds: int
    # Rounds for the balanced split.
    balanced_rounds: int


EFFORTS = {
    # One way and no windows: they are added up.
    "fast": Effort(((-0.3, 0.0),), 4, 0, 8, (), 0, 1),
    "default": Effort(
        ((0.0, 0.0), (-0.4, 0.0), (-0.7, 0.0), (-0.8, 0.0), (-0.5, 0.25)),
        12,
        32,
        100,
        (1.0, 1.5, 3.0),
        80,
        3,
    ),
    "best": Effort(
        (
            (0.0, 0.0),
            (-0.15, 0.0),
            (-0.3, 0.0),
            (-0.6, 0.0),
            (-0.8, 0.0),
            (-0.15, 0.12),
            (-0.4, 0.12),
            (-0.7, 0.06),
            (-0.3, 0.25),
            (-0.5, 0.25),
        ),
        0,
        40,
        800,
        (1.0, 1.5, 2.0, 3.0, 6.0),
        150,
        7,
    ),
}


def effort_of(name: str) -> Effort:
    """Raises ValueError for an unknown name."""
    if name not in EFFORTS:
        raise ValueError(f"effort {name!r} must be one of: {', '.join(EFFORTS)}")
    return EFFORTS[name]
