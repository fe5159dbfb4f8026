import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.routing import occurrence


def test_equal_ids_are_numbered_in_their_order():
    assert occurrence(jnp.array([1, 1, 0, 1, 0]), 2).tolist() == [0, 1, 0, 2, 1]


@given(st.one_of(*(st.lists(st.integers(0, 4), min_size=n, max_size=n) for n in (0, 1, 5, 30))))
def test_occurrence_is_the_count_of_equal_ids_before(ids):
    expected = [ids[:i].count(x) for i, x in enumerate(ids)]
    result = occurrence(jnp.array(ids, jnp.int32), 5)
    np.testing.assert_array_equal(result, np.array(expected, int))
