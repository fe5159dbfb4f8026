"""One plan from one load, however it is asked for; all of one shape and the least effort."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.placement import Placement
from jax_eplb.planner import plan

pytestmark = pytest.mark.light_compile


def slots_of(result) -> np.ndarray:
    return np.asarray(result.placement.slot_to_expert, np.int64)


def lognormal(sigma, seed=0):
    return np.rint(np.random.default_rng(seed).lognormal(0, sigma, (3, 16)) * 10_000)


fast_plan = functools.partial(plan, num_slots=20, num_ranks=4, effort="fast")
jitted_plan = jax.jit(fast_plan)


@pytest.mark.slow
def test_fast_plans_add_windows_up():
    windows = np.random.default_rng(0).integers(0, 2**40, (2, 3, 16))
    together, summed = fast_plan(windows), fast_plan(windows.sum(axis=0))
    np.testing.assert_array_equal(slots_of(together), slots_of(summed))


@pytest.mark.slow
def test_jax_and_numpy_loads_give_the_same_plan_eager_jitted_and_mapped():
    load = lognormal(1.0)
    expected = slots_of(fast_plan(load))
    on_device = jnp.asarray(load, jnp.float32)
    np.testing.assert_array_equal(slots_of(fast_plan(on_device)), expected)
    np.testing.assert_array_equal(slots_of(jitted_plan(on_device)), expected)
    mapped = jax.vmap(fast_plan)(on_device.reshape(3, 1, 16))
    np.testing.assert_array_equal(slots_of(mapped).reshape(3, 20), expected)


@pytest.mark.slow
def test_nan_inside_jit_counts_as_no_load():
    load = lognormal(1.0).astype(np.float32)
    damaged = load.copy()
    damaged[:, :4] = [np.nan, -1, -np.inf, 0]
    load[:, :4] = 0
    result = jitted_plan(jnp.array(damaged))
    np.testing.assert_array_equal(slots_of(result), slots_of(jitted_plan(jnp.array(load))))
    Placement.from_slots(slots_of(result), num_experts=16, num_ranks=4)


@pytest.mark.slow
def test_a_second_plan_of_the_same_shape_compiles_nothing(caplog):
    def compilations(load):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            fast_plan(load)
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    compilations(lognormal(0.5))
    assert compilations(lognormal(2.0, seed=1)) == 0
    assert compilations(np.zeros((3, 16), np.int32)) == 0
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(0.0)
    assert "Finished XLA compilation" in caplog.text  # so those of a plan would have been seen
