"""The lower bound by itself: how high it is, and what it takes.

Axes: L layers, E experts, S slots, P ranks.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.loads import KINDS, SIZES, Size, draw_load
from benchmarks.setting import Setting
from benchmarks.tables import Column, Table
from benchmarks.timing import time_warm
from jax_eplb.planner.bound import lower_bound

_LARGE = (SIZES[0], SIZES[3], Size(1024, 2000, 1000))


def bounds(
    setting: Setting, sizes: Sequence[Size] = _LARGE, kinds: Sequence[str] = KINDS
) -> list[Table]:
    """Bounds under both splits, and the warm time of that of the even split."""
    rows = []
    for size, kind in setting.track([(s, k) for s in sizes for k in kinds], "bounds"):
        load = jnp.asarray(draw_load(kind, setting.num_layers, size.experts), jnp.float32)
        bound = functools.partial(lower_bound, load, num_slots=size.slots, num_ranks=size.ranks)
        even, balanced = (
            100 * float(np.asarray(bound(split=split), np.float64).mean())
            for split in ("even", "balanced")
        )
        row = {"size": str(size), "load": kind, "even": even, "balanced": balanced}
        rows.append(row | time_warm(bound, setting.repeats)._asdict())
    columns = [
        Column("size", "E/S/P"),
        Column("load", "load"),
        Column("even", "even split", 2),
        Column("balanced", "balanced split", 2),
        Column("median_ms", "median, ms", 1),
        Column("least_ms", "least, ms", 1),
    ]
    title = f"Lower bound of the imbalance, percent, {setting.num_layers} layers"
    return [Table(title, columns, rows)]
