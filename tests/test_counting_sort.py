import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.kernels import counting_sort
from jax_eplb.kernels.counting_sort import by_counting

pytestmark = pytest.mark.light_compile

# Compiled whole: one operation after another, each would be a program of its own.
SORTS = {sort.__name__: jax.jit(sort, static_argnums=1) for sort in (counting_sort, by_counting)}
each_sort = pytest.mark.parametrize("sort", SORTS.values(), ids=SORTS)
# Shorter than a block, and as long as one or longer by one.
SIZES = [1, 256, 257, *(pytest.param(size, marks=pytest.mark.slow) for size in (5, 255, 1500))]


@each_sort
@pytest.mark.parametrize("size", SIZES)
@given(seed=st.integers(0, 2**31))
def test_it_is_numpys_stable_sort(sort, size, seed):
    values = np.random.default_rng(seed).integers(0, 8, size).astype(np.int32)  # 7: not counted
    found = sort(values, 7)
    order = np.argsort(values, kind="stable")
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.place[order], np.arange(size))
    np.testing.assert_array_equal(found.counts, np.bincount(values, minlength=8)[:7])


@each_sort
def test_nothing_is_sorted_into_nothing(sort):
    found = sort(np.zeros(0, np.int32), 3)
    assert found.order.shape == found.place.shape == (0,)
    assert found.counts.tolist() == [0, 0, 0]
