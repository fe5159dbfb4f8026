"""One point of the scaling benchmark, in a fresh process: time and memory of a plan.

    python -m benchmarks.scaling_point LAYERS EXPERTS SLOTS RANKS [--effort default] [--repeats N]

Prints one JSON object. Memory is the peak of what the process ever held, compilation included.
"""

import argparse
import functools
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loads import Size, draw_load
from benchmarks.setting import EFFORTS, plan_for
from benchmarks.timing import time_warm

_KIND = "sigma 1"


def peak_memory_mb() -> float:
    """Largest resident size of this process so far.

    On Linux from /proc: getrusage's would count the process that started this one, up to there.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_layers: int, size: Size, effort: str, repeats: int) -> dict[str, float]:
    """First call, warm calls, peak memory before and after, imbalance and bound in percent."""
    load = draw_load(_KIND, num_layers, size.experts)
    jax.block_until_ready(jnp.zeros(1) + 1)  # JAX itself is up
    before = peak_memory_mb()
    planned = functools.partial(plan_for, size, load, effort=effort)
    start = time.perf_counter()
    result = jax.block_until_ready(planned())
    first = time.perf_counter() - start
    warm = time_warm(planned, repeats)
    assert warm.median_ms is not None
    return {
        "median_ms": warm.median_ms,
        "least_ms": float(warm.least_ms or 0),
        "compile_s": max(first - warm.median_ms / 1e3, 0.0),
        "memory_before_mb": before,
        "memory_peak_mb": peak_memory_mb(),
        "imbalance": 100 * float(np.asarray(result.imbalance, np.float64).mean()),
        "bound": 100 * float(np.asarray(result.lower_bound, np.float64).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one plan.")
    for name in ("layers", "experts", "slots", "ranks"):
        parser.add_argument(name, type=int)
    parser.add_argument("--effort", choices=EFFORTS, default="default")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    size = Size(given.experts, given.slots, given.ranks)
    print(json.dumps(measure(given.layers, size, given.effort, given.repeats)))


if __name__ == "__main__":
    main()
