"""What a device can do at most, and times of calls in bursts, alike for everything compared.

A GPU lowers its clocks under a long load. So each figure is taken from short bursts of calls after
a rest, the ceilings too. Launching the first call and hearing of the last takes up to half a
millisecond, which is no call's: there each burst is compared with one of twice as many calls.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_BURSTS, _BURST_SECONDS, _REST_SECONDS = 9, 0.02, 0.05


class Ceilings(NamedTuple):
    """Rates that no program on the device exceeds by much."""

    bandwidth: float  # bytes per second, read and written together
    flops: float  # per second, of a large matrix product

    def floor_ms(self, num_bytes: float, num_flops: float) -> float:
        """The least time for so many bytes and operations, which may overlap.

        >>> Ceilings(bandwidth=1e12, flops=1e14).floor_ms(num_bytes=2e9, num_flops=1e11)
        2.0
        """
        return 1e3 * max(num_bytes / self.bandwidth, num_flops / self.flops)


def add_ceiling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `given_or_measured` reads."""
    parser.add_argument("--bandwidth", type=float, help="bytes per second, instead of measuring")
    parser.add_argument("--flops", type=float, help="operations per second, instead of measuring")


def given_or_measured(arguments: argparse.Namespace, dtype: str) -> Ceilings:
    """The ceilings of this run."""
    found = measure_ceilings(dtype)
    return Ceilings(arguments.bandwidth or found.bandwidth, arguments.flops or found.flops)


def measure_ceilings(dtype: str, *, size: int | None = None) -> Ceilings:
    """Copy a large array, and multiply two large matrices of `size` rows and columns."""
    size = size or (8192 if jax.default_backend() == "gpu" else 1024)
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    large = jnp.tile(left.reshape(-1), 16)
    num_bytes = large.nbytes
    copy_ms = burst_ms(jax.jit(lambda x: x + 1), large)
    del large
    product_ms = burst_ms(jax.jit(jnp.matmul), left, right)
    return Ceilings(2e3 * num_bytes / copy_ms, 2e3 * size**3 / product_ms)


def compile_all(calls: Mapping[Any, tuple[Callable, Sequence]]) -> dict[Any, Any]:
    """Compile several functions of arguments at once; the error's text for one that fails.

    One by one where there are several processes: they share out what XLA tries to find the fastest
    kernels, and may wait for each other long if their programs come in different orders.
    """

    def compiled(call):
        function, arguments = call
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:  # a peer may refuse a shape in any way
            return f"{type(error).__name__}: {error}"

    at_once = 1 if jax.process_count() > 1 else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(calls, pool.map(compiled, calls.values()), strict=True))


def burst_ms(call: Callable, *arguments, bursts: int = _BURSTS) -> float:
    """Time of one call among calls that are launched without waiting, in ms."""
    on_gpu = jax.default_backend() == "gpu"

    def seconds(count: int) -> float:
        time.sleep(_REST_SECONDS if on_gpu else 0)
        start = time.perf_counter()
        for _ in range(count):
            result = call(*arguments)  # the one before is freed
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds(1)  # the first takes longer
    calls = math.ceil(min(100.0, _BURST_SECONDS / seconds(1)))
    if jax.process_count() > 1:  # else one would wait for what another does not send
        calls = int(multihost_utils.broadcast_one_to_all(np.int32(calls)))
    if not on_gpu:  # calls do not queue, and a difference would be of noise
        return float(1e3 * np.median([seconds(calls) for _ in range(bursts)]) / calls)
    # What disturbs the shorter burst of a pair makes the difference too small, else too large.
    more = [seconds(2 * calls) - seconds(calls) for _ in range(bursts)]
    return float(1e3 * np.median(more) / calls)


def device_ms(call: Callable, *arguments, calls: int = 5) -> float:
    """Time that one call keeps the device busy: on a GPU what its profiler adds up.

    Elsewhere the time of the call. A short kernel takes less than its launch, so the time of a
    call would show the launch.
    """
    if jax.default_backend() != "gpu":
        return burst_ms(call, *arguments)
    jax.block_until_ready(call(*arguments))
    time.sleep(_REST_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call(*arguments) for _ in range(calls)])
        (file,) = Path(folder).glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        return sum(
            event.duration_ns / 1e6 / calls
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        )
