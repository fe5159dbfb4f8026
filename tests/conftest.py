"""The test run owns its devices: eight on the CPU, set before JAX starts.

Compiled programs are kept in `.pytest_cache`, for the other worker, for the processes that tests
start, and for the next run: compiling is most of the time that the tests take. Modules marked
`light_compile`, and all where the slow tests are left out, are compiled with few optimisations
(see `light_compile.py`).
"""

import os
from pathlib import Path

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis
import jax
import matplotlib
import pytest

from tests.light_compile import is_light, set_light

# On a busy machine the eight devices may wait for each other longer than the 40 s after which XLA
# takes them for stuck, and ends the process.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests first; the order within a file stays."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _compile_as_marked(request):
    quick = request.config.option.markexpr == "not slow"
    light = quick or request.node.get_closest_marker("light_compile") is not None
    if light != is_light():
        jax.clear_caches()  # or programs of the other sort would be taken
        set_light(light)
