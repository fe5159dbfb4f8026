"""The test run owns its devices: eight on the CPU, set before JAX starts.

Compiled programs are kept in `.pytest_cache`, for the other worker, for the processes that tests
start, and for the next run: compiling is most of the time that the tests take. Modules marked
`light_compile`, the examples in docstrings, and all where the slow tests are left out, are compiled
with few optimisations (see `light_compile.py`).
"""

import gc
import os
from pathlib import Path

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
# To keep a program takes a tenth of a second, and in a first run one of ten is taken again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
# Nobody reads which lines of Python an operation came from; to note them is a tenth of the tracing.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import hypothesis
import jax
import matplotlib
import pytest

from tests.light_compile import is_light, set_light

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        # On a busy machine the eight devices may wait for each other longer than the 40 s after
        # which XLA takes them for stuck, and ends the process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        # One thread compiles: the other tests have the other cores.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
# Threads for eight devices, as `simulate_devices` has them.
os.environ.setdefault("NPROC", "32")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("fixed")

if len(jax.devices()) != 8:
    raise RuntimeError(f"the tests need 8 CPU devices; JAX started with {jax.devices()}")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "light_compile: of a module: compile with few optimisations, to save time"
    )
    # Two workers end together if the longest files are begun first: see below.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def is_example(node: pytest.Item | pytest.Module) -> bool:
    """Whether it is a docstring of the package."""
    return not node.path.is_relative_to(Path(__file__).parent)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is slow without saying so; then files with slow tests first, the order within stays."""
    for item in items:
        # Each example compiles programs of its own shapes; of the same functions there are quick
        # tests. And `-m "not slow"`, which replaces the `-m` of `addopts`, is to leave soaks out.
        if is_example(item) or item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported and collected stays; to look at it for garbage takes time again and again.

    Tracing makes many objects, which makes Python look often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _compile_as_marked(request):
    quick = request.config.option.markexpr == "not slow"
    marked = request.node.get_closest_marker("light_compile") is not None
    light = quick or marked or is_example(request.node)
    if light != is_light():
        jax.clear_caches()  # or programs of the other sort would be taken
        set_light(light)
