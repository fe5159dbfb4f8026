"""Time of one plan, and the imbalance it leaves, beside the plain greedy in NumPy.

    python -m benchmarks.planner [--experts 256 --slots 288 --ranks 36 --layers 58] [--json]

The loads: lognormal(0, sigma), or arange(1, E + 1)^-1.2 times lognormal(0, 0.1) in random order,
scaled to 262,144 tokens a layer and rounded; planned and scored on the same load, even split.
Both are scored by the same code, on the host. Times are of warm calls; the first one compiles.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_eplb.planner import plan
from tests.greedy_reference import greedy_plan, imbalance_of

KINDS = ("sigma 0.5", "sigma 1", "sigma 1.5", "sigma 2", "zipf")
_SEED = 20261124
_TOKENS = 262_144


def draw_load(kind: str, num_layers: int, num_experts: int) -> np.ndarray:
    """Seeded loads of one kind, float64[L, E], whole numbers."""
    generator = np.random.default_rng([KINDS.index(kind), num_experts, _SEED])
    shape = (num_layers, num_experts)
    if kind == "zipf":
        heavy = np.arange(1, num_experts + 1) ** -1.2
        load = generator.permuted(heavy * generator.lognormal(0, 0.1, shape), axis=1)
    else:
        load = generator.lognormal(0, float(kind.split()[1]), shape)
    return np.rint(load / load.sum(axis=1, keepdims=True) * _TOKENS)


def time_warm(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and least time of one call, in ms, after a first call that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times)), min(times)


def measure(kind: str, sizes: argparse.Namespace) -> dict[str, float | str]:
    """One row: mean imbalance over layers and times of both planners."""
    load = draw_load(kind, sizes.layers, sizes.experts)
    ours = functools.partial(plan, load, num_slots=sizes.slots, num_ranks=sizes.ranks)
    greedy = functools.partial(greedy_plan, load, sizes.slots, sizes.ranks)
    result = ours()
    slots = np.asarray(result.placement.slot_to_expert)
    ours_ms, ours_least = time_warm(lambda: jax.block_until_ready(ours()), sizes.repeats)
    greedy_ms, greedy_least = time_warm(greedy, sizes.repeats)
    return {
        "load": kind,
        "imbalance": float(imbalance_of(load, slots, sizes.ranks).mean()),
        "imbalance_greedy": float(imbalance_of(load, greedy(), sizes.ranks).mean()),
        "lower_bound": float(np.asarray(result.lower_bound).mean()),
        "median_ms": ours_ms,
        "least_ms": ours_least,
        "greedy_median_ms": greedy_ms,
        "greedy_least_ms": greedy_least,
    }


def print_table(rows: list[dict], sizes: argparse.Namespace) -> None:
    title = (
        f"{sizes.layers} layers, {sizes.experts} experts, {sizes.slots} slots, {sizes.ranks} ranks"
    )
    table = Table(title=title)
    for column in ("load", "imbalance", "greedy", "lower bound", "ms", "greedy ms"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for row in rows:
        table.add_row(
            row["load"],
            *(f"{row[key]:.5f}" for key in ("imbalance", "imbalance_greedy", "lower_bound")),
            *(f"{row[key]:.1f}" for key in ("median_ms", "greedy_median_ms")),
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and quality of the planner.")
    for name, default in (("experts", 256), ("slots", 288), ("ranks", 36), ("layers", 58)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls for each load")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    sizes = parser.parse_args()
    rows = [measure(kind, sizes) for kind in KINDS]
    if sizes.json:
        print(json.dumps({"sizes": vars(sizes) | {"device": str(jax.devices()[0])}, "rows": rows}))
    else:
        print_table(rows, sizes)


if __name__ == "__main__":
    main()
