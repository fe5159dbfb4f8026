"""A recording whose hot experts change half-way, and sizes that the simulator's tests share."""

import numpy as np

from jax_eplb import Recording

NUM_RANKS, NUM_SLOTS, HISTORY = 2, 8, 3


def changing_counts() -> np.ndarray:
    """int64[12, 2, 6]: experts 0 and 1 are hot, from window 6 on experts 4 and 5."""
    weights = np.array([[9.0, 5, 1, 1, 1, 1], [5.0, 9, 2, 1, 1, 1]])
    by_window = np.stack([weights if w < 6 else weights[:, ::-1] for w in range(12)])
    return np.random.default_rng(3).poisson(40 * by_window).astype(np.int64)


def changing_recording(**keywords) -> Recording:
    return Recording(changing_counts(), num_experts=6, experts_per_token=2, **keywords)


def uniform_recording(windows: int = 12) -> Recording:
    """The same sizes, and nothing but chance."""
    counts = np.random.default_rng(4).multinomial(3000, np.full(6, 1 / 6), (windows, 2))
    return Recording(counts.astype(np.int64), num_experts=6, experts_per_token=2)
