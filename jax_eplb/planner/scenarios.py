"""Scenarios: what the next iterations may look like, made from those that were seen.

Axes: W windows, L layers, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.jit, static_argnames=("num_scenarios",))
def draw_scenarios(
    windows: Float[Array, "W L E"], *, num_scenarios: int, noise: float | Float[Array, ""] = 0.2
) -> Float[Array, "scenarios L E"]:
    """Windows as shares of their layer's tokens, evenly spaced in time or repeated, each blurred.

    Every number is multiplied by lognormal(0, noise), anew in each repetition: without it, a search
    over few windows learns them by heart. The randomness is fixed. A window in which a layer saw no
    token counts there as the mean of the others; a layer without any, as all experts alike.

    >>> draw_scenarios(jnp.array([[[3.0, 1.0]]]), num_scenarios=2, noise=0.0).tolist()
    [[[0.75, 0.25]], [[0.75, 0.25]]]
    """
    num_windows, _, num_experts = windows.shape
    total = windows.sum(axis=-1, keepdims=True)
    share = windows / jnp.where(total > 0, total, 1.0)
    seen = (total > 0).astype(jnp.float32)
    mean = share.sum(axis=0) / jnp.maximum(seen.sum(axis=0), 1.0)
    mean = jnp.where(seen.sum(axis=0) > 0, mean, 1 / num_experts)
    share = jnp.where(total > 0, share, mean[None])
    if num_windows > num_scenarios:
        chosen = jnp.linspace(0, num_windows - 1, num_scenarios).round().astype(jnp.int32)
    else:
        chosen = jnp.arange(num_scenarios, dtype=jnp.int32) % num_windows
    drawn = share[chosen]
    blurred = drawn * jnp.exp(noise * jax.random.normal(jax.random.key(0), drawn.shape))
    return blurred / blurred.sum(axis=-1, keepdims=True)


def enough_scenarios(num_windows: int, least: int = 64) -> int:
    """As many as windows, from `least` to twice that.

    >>> [enough_scenarios(n) for n in (3, 100, 5000)]
    [64, 100, 128]
    """
    return min(max(num_windows, least), 2 * least)


def power_mean(
    share: Float[Array, "scenarios L E"], power: Float[Array, ""]
) -> Float[Array, "L E"]:
    """(mean over scenarios of share^power)^(1 / power): near the mean at 1, the peak if high.

    >>> power_mean(jnp.array([[[1.0, 3.0]], [[1.0, 4.0]]]), jnp.float32(2)).round(2).tolist()
    [[1.0, 3.5399999618530273]]
    """
    # Divided by the peak, so that no power of a small share is lost to rounding.
    peak = jnp.maximum(share.max(axis=0), 1e-30)
    return peak * ((share / peak[None]) ** power).mean(axis=0) ** (1 / power)
