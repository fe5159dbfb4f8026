"""Times of planners, measured in turn so that a busy machine slows all of them alike."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Key = TypeVar("Key")


class Times(NamedTuple):
    """Of one planner, in ms; None where it failed."""

    median_ms: float | None
    least_ms: float | None


def warm_ms(call: Callable[[], Any]) -> float:
    """Time of a call, after one that does not count: it compiles, and warms the caches."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def time_warm(call: Callable[[], Any], rounds: int) -> Times:
    """Median and least of several warm calls."""
    return in_turn({"call": functools.partial(warm_ms, call)}, rounds)["call"]


def in_turn(clocks: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, Times]:
    """Median and least of several rounds, in each of which every clock is read once.

    A clock returns ms, NaN for a failure; it is not asked again after one.

    >>> in_turn({"a": iter([3.0, 1.0, 2.0]).__next__, "b": lambda: math.nan}, 3)
    {'a': Times(median_ms=2.0, least_ms=1.0), 'b': Times(median_ms=None, least_ms=None)}
    """
    read: dict[Key, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            if not any(map(math.isnan, read[name])):
                read[name].append(clock())
    return {name: _summary(times) for name, times in read.items()}


def _summary(times: list[float]) -> Times:
    if any(map(math.isnan, times)):
        return Times(None, None)
    return Times(float(np.median(times)), min(times))
