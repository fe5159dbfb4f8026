import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.kernels import counting_sort
from jax_eplb.kernels.counting_sort import by_counting

SORTS = [counting_sort, by_counting]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1500])
@given(seed=st.integers(0, 2**31))
def test_it_is_numpys_stable_sort(sort, size, seed):
    values = np.random.default_rng(seed).integers(0, 8, size).astype(np.int32)  # 7: not counted
    found = jax.jit(sort, static_argnums=1)(values, 7)
    order = np.argsort(values, kind="stable")
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.place[order], np.arange(size))
    np.testing.assert_array_equal(found.counts, np.bincount(values, minlength=8)[:7])


@pytest.mark.parametrize("sort", SORTS)
def test_nothing_is_sorted_into_nothing(sort):
    found = sort(jnp.zeros(0, jnp.int32), 3)
    assert found.order.shape == found.place.shape == (0,)
    assert found.counts.tolist() == [0, 0, 0]
