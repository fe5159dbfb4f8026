"""Seeded loads and sizes that the planner is measured on.

Axes: W windows, L layers, E experts, S slots, P ranks.

The loads: lognormal(0, sigma), or arange(1, E + 1)^-1.2 times lognormal(0, 0.1) in random order,
scaled to 262,144 tokens a layer and rounded.
"""

from typing import NamedTuple

import numpy as np

KINDS = ("sigma 0.5", "sigma 1", "sigma 1.5", "sigma 2", "zipf")
NUM_LAYERS = 58  # DeepSeek-R1
_SEED = 20261124
_TOKENS = 262_144


class Size(NamedTuple):
    """What a plan is for; written E/S/P."""

    experts: int
    slots: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.experts}/{self.slots}/{self.ranks}"


SIZES = tuple(
    Size(*size)
    for size in (
        (256, 288, 36),
        (256, 320, 32),
        (256, 320, 64),
        (256, 320, 160),
        (128, 144, 16),
        (128, 160, 16),
        (128, 160, 32),
        (64, 96, 32),
    )
)


def draw_load(kind: str, num_layers: int, num_experts: int) -> np.ndarray:
    """Loads of one kind, float64[L, E], whole numbers.

    >>> draw_load("sigma 1", 1, 3).astype(int).tolist()
    [[105739, 64901, 91504]]
    """
    generator = np.random.default_rng([KINDS.index(kind), num_experts, _SEED])
    shape = (num_layers, num_experts)
    if kind == "zipf":
        heavy = np.arange(1, num_experts + 1) ** -1.2
        load = generator.permuted(heavy * generator.lognormal(0, 0.1, shape), axis=1)
    else:
        load = generator.lognormal(0, float(kind.split()[1]), shape)
    return np.rint(load / load.sum(axis=1, keepdims=True) * _TOKENS)


def drifted(load: np.ndarray, sigma: float = 0.3, *, windows: int | None = None) -> np.ndarray:
    """A load some time later: each number times lognormal(0, sigma), whole numbers.

    [L, E], or [W, L, E] with the number of windows given: each one drifted on its own.
    """
    generator = np.random.default_rng([load.shape[1], windows or 0, _SEED])
    shape = load.shape if windows is None else (windows, *load.shape)
    return np.rint(load * generator.lognormal(0, sigma, shape))
