"""Worth it or not: what a placement saves against what bringing it about costs, in seconds.

Axes: L layers.
"""

from typing import NamedTuple

import numpy as np


class Costs(NamedTuple):
    """What was measured, or given."""

    seconds_per_token: float  # of one rank, in one layer, for each choice it computes
    bytes_per_second: float  # of moving weights
    bytes_per_slot: int  # one expert's weights in one layer


def seconds_saved(
    imbalance_before: np.ndarray,
    imbalance_expected: np.ndarray,
    tokens_per_rank: np.ndarray,
    costs: Costs,
) -> np.ndarray:
    """What each layer gains in one iteration, float64[L].

    A layer takes as long as its fullest rank, which has (1 + imbalance) times the mean: so many
    tokens fewer there, each for `seconds_per_token`. `tokens_per_rank`: the mean of an iteration.

    >>> costs = Costs(seconds_per_token=1e-6, bytes_per_second=1e9, bytes_per_slot=1_000_000)
    >>> seconds_saved(np.array([0.5]), np.array([0.25]), np.array([400]), costs).round(9).tolist()
    [0.0001]
    """
    gain = np.asarray(imbalance_before, np.float64) - np.asarray(imbalance_expected, np.float64)
    return gain * np.asarray(tokens_per_rank, np.float64) * costs.seconds_per_token


def seconds_to_move(moves: np.ndarray, costs: Costs) -> np.ndarray:
    """What the moves of each layer take, float64[L], one after the other.

    They travel side by side and beside the step, so this is the most that they can cost.

    >>> costs = Costs(seconds_per_token=1e-6, bytes_per_second=1e9, bytes_per_slot=1_000_000)
    >>> seconds_to_move(np.array([3]), costs).tolist()
    [0.003]
    """
    return np.asarray(moves, np.float64) * costs.bytes_per_slot / costs.bytes_per_second


def worth_moving(saved: np.ndarray, cost: np.ndarray, horizon: int | None) -> np.ndarray:
    """bool[L]: the layers whose moves pay back within `horizon` iterations.

    Without a horizon, all that gain anything.

    >>> worth_moving(np.array([0.001, 0.0001]), np.array([0.003, 0.003]), 10).tolist()
    [True, False]
    """
    if horizon is None:
        return saved > 0
    return saved * horizon > cost
