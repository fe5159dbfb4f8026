"""Metrics: how even the ranks' token counts are. Nothing else computes them.

Axes: W windows (iterations), L layers, P ranks; `...` any leading axes.

Every function of counts takes numpy arrays, and then computes in float64 on the host, for reports;
or JAX arrays, traced or not, and then computes in float32.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# numpy in, numpy out; JAX in, JAX out.
Tokens = TypeVar("Tokens", jax.Array, np.ndarray)


def imbalance(rank_tokens: Tokens, capacity: Tokens | None = None) -> Tokens:
    """(max - mean) / mean over the ranks, [..., P] to [...]; 0 where there are no tokens.

    TensorRT-LLM's imbalance ratio. 0 is perfect, P - 1 is everything on one rank. With `capacity`,
    the relative speed of each rank, [P], it is of times, tokens / capacity, and perfect is where
    all ranks take as long; what a rank of capacity 0 computes does not count.

    >>> imbalance(np.array([[3, 1], [2, 2], [0, 0]])).tolist()
    [0.5, 0.0, 0.0]
    >>> imbalance(np.array([[3, 1], [2, 2]]), np.array([3.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    xp, tokens = _as_float(rank_tokens)
    times, mean = _times(xp, tokens, capacity)
    return (times.max(axis=-1) - mean) / xp.where(mean > 0, mean, xp.ones_like(mean))


def spread(rank_tokens: Tokens) -> Tokens:
    """Standard deviation over the ranks with ddof = 1, [..., P] to [...], in tokens.

    0 where P = 1: a single rank has nothing to differ from.

    >>> spread(np.array([[3, 1, 2], [2, 2, 2]])).tolist()
    [1.0, 0.0]
    """
    xp, tokens = _as_float(rank_tokens)
    return tokens.std(axis=-1, ddof=1) if tokens.shape[-1] > 1 else xp.zeros(tokens.shape[:-1])


def balancedness_mean_of_ratios(rank_tokens: Tokens, capacity: Tokens | None = None) -> Tokens:
    """Mean over layers of mean / max over the ranks, [..., L, P] to [...].

    SGLang's balancedness. 1 is perfect, 1 / P is everything on one rank; a layer without tokens
    counts as 1. `capacity` as for `imbalance`.

    >>> balancedness_mean_of_ratios(np.array([[3, 1], [40, 40]])).round(3)
    np.float64(0.833)
    """
    xp, tokens = _as_float(rank_tokens)
    times, mean = _times(xp, tokens, capacity)
    most = times.max(axis=-1)
    ratio = mean / xp.where(most > 0, most, xp.ones_like(most))
    return xp.where(most > 0, ratio, xp.ones_like(ratio)).mean(axis=-1)


def balancedness_from(imbalance: Tokens) -> Tokens:
    """The same from the layers' imbalances, [..., L] to [...].

    >>> balancedness_from(np.array([0.5, 0.0])).round(3)
    np.float64(0.833)
    """
    _, values = _as_float(imbalance)
    return (1 / (1 + values)).mean(axis=-1)


def balancedness_ratio_of_sums(rank_tokens: Tokens) -> Tokens:
    """Sum over layers of the mean / sum over layers of the max, [..., L, P] to [...].

    vLLM's balancedness: the share of the step in which a rank is busy, where all layers are
    equally fast. 1 is perfect, 1 / P is everything on one rank; 1 where there are no tokens.

    >>> balancedness_ratio_of_sums(np.array([[3, 1], [40, 40]])).round(3)
    np.float64(0.977)
    """
    xp, tokens = _as_float(rank_tokens)
    most = tokens.max(axis=-1).sum(axis=-1)
    ratio = tokens.mean(axis=-1).sum(axis=-1) / xp.where(most > 0, most, xp.ones_like(most))
    return xp.where(most > 0, ratio, xp.ones_like(ratio))


class Average(NamedTuple):
    """The `average` row of a report: means over layers."""

    mean: float
    std: float
    imbalance: float


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """A report's table on the host: one row per layer, each an average over iterations."""

    mean: np.ndarray  # float64[L], tokens per rank
    std: np.ndarray  # float64[L], tokens per rank, ddof = 1
    imbalance: np.ndarray  # float64[L]
    average: Average


def summarize(rank_tokens: np.ndarray) -> Summary:
    """Mean, standard deviation and imbalance of the ranks' tokens, [W, L, P], by layer.

    The figures that TensorRT-LLM prints: computed for each iteration, averaged over iterations,
    then over layers, in float64. Iterations in which a layer saw no token do not count for that
    layer; a layer that never saw one is all zeros and does not count in the average row.

    >>> summarize(np.array([[[3, 1]], [[4, 4]], [[0, 0]]])).average
    Average(mean=3.0, std=0.7071067811865476, imbalance=0.25)
    """
    tokens = np.asarray(rank_tokens)
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            f"rank tokens have shape {tokens.shape}; expected [windows, layers, ranks], none 0"
        )
    seen = tokens.sum(axis=-1) > 0  # [W, L]
    per_iteration = (tokens.mean(axis=-1), spread(tokens), imbalance(tokens))
    layers = [_mean_where(values, seen) for values in per_iteration]
    active = seen.any(axis=0)
    average = Average(*(float(_mean_where(values, active)) for values in layers))
    return Summary(*layers, average=average)


def chance_imbalance(
    choices: np.ndarray | int, num_ranks: int, *, samples: int = 200, seed: int = 0
) -> np.ndarray:
    """The imbalance that chance alone would leave, float64 in the shape of `choices`.

    `choices` are the tokens x top-k choices that a layer routes in one iteration, over all ranks.
    The assumption: each choice falls on a rank evenly and independently of the others, as under a
    plan that is perfect on average. A token's choices are in truth distinct experts, which makes
    real figures slightly lower, and the tokens of a text resemble each other, which makes them
    higher. The mean of `samples` seeded draws; the same arguments give the same figure.

    >>> chance_imbalance(np.array([0, 1_000, 100_000]), 8).round(3).tolist()
    [0.0, 0.126, 0.013]
    """
    values, inverse = np.unique(np.asarray(choices), return_inverse=True)
    expected = [_simulate_chance(int(n), num_ranks, samples, seed) for n in values]
    return np.array(expected)[inverse].reshape(np.shape(choices))


def _simulate_chance(choices: int, num_ranks: int, samples: int, seed: int) -> float:
    # Seeded by the value too, so that no figure depends on its neighbours.
    generator = np.random.default_rng([seed, choices, num_ranks])
    drawn = generator.multinomial(choices, np.full(num_ranks, 1 / num_ranks), size=samples)
    return float(imbalance(drawn).mean())


def _mean_where(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the entries that count; 0 where none does."""
    return np.where(counted, values, 0).sum(axis=0) / np.maximum(counted.sum(axis=0), 1)


def _times(xp, tokens, capacity) -> tuple[Any, Any]:
    """What each rank takes, [..., P], and what all would if they took as long, [...]."""
    if capacity is None or (xp is np and (capacity == 1).all()):  # often, and quicker
        return tokens, tokens.mean(axis=-1)
    speed = xp.asarray(capacity, tokens.dtype)
    live = xp.broadcast_to(speed > 0, tokens.shape)
    tokens = xp.where(live, tokens, xp.zeros_like(tokens))
    divisor = xp.broadcast_to(xp.where(speed > 0, speed, xp.ones_like(speed)), tokens.shape)
    return tokens / divisor, tokens.sum(axis=-1) / speed.sum()


def _as_float(rank_tokens) -> tuple[Any, Any]:
    """The array's own library, and the array as that library's floats."""
    if isinstance(rank_tokens, jax.Array):
        return jnp, rank_tokens.astype(jnp.float32)
    return np, np.asarray(rank_tokens, np.float64)
