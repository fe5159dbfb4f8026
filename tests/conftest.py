"""The test run owns its devices: eight on the CPU, set before JAX starts."""

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
