"""The test run owns its devices: eight on the CPU, set before JAX starts.

Compiled programs are kept in `.pytest_cache`, for the other worker, for the processes that tests
start, and for the next run: compiling is most of the time that the tests take.
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

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("fixed")

if len(jax.devices()) != 8:
    raise RuntimeError(f"the tests need 8 CPU devices; JAX started with {jax.devices()}")
