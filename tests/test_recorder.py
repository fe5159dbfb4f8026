"""What `test_load.py` leaves: the recorder beside direct sums, and that it does not wait."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb import Recorder


class Unread:
    """Stands for a device array whose values nobody may ask for yet."""

    def __init__(self, values):
        self.values, self.readable = values, False

    def __array__(self, dtype=None, copy=None):
        if not self.readable:
            raise AssertionError("the recorder waited for the device")
        return np.asarray(self.values, dtype)


def unread(values) -> Any:
    return Unread(np.asarray(values))


def recorder(**keywords):
    return Recorder(num_experts=5, experts_per_token=1, layer_ids=(1, 2, 3), **keywords)


@given(
    st.integers(0, 6), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 4), st.integers(0, 9)
)
def test_counts_are_the_direct_sums_of_the_half_open_range(start, length, ranks, seed):
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, 2**20, (8, ranks, 3, 5)).astype(np.int32)
    by_rank = generator.integers(0, 2**20, (8, ranks, 3)).astype(np.int32)
    kept = recorder(start=start, stop=None if length is None else start + length)
    for counts, tokens in zip(steps, by_rank, strict=True):
        kept.record(jnp.asarray(counts), jnp.asarray(tokens))
    made = kept.recording()
    window = slice(start, None if length is None else start + length)
    assert made.iterations == tuple(range(8))[window]
    np.testing.assert_array_equal(made.counts, steps[window].astype(np.int64).sum(axis=1))
    np.testing.assert_array_equal(made.rank_tokens, by_rank[window].transpose(0, 2, 1))


def test_recording_a_step_does_not_wait_for_it():
    kept = recorder()
    steps = [(unread(np.ones((2, 3, 5), int)), unread(np.ones((2, 3), int))) for _ in range(60)]
    for step in steps:
        kept.record(*step)
    for counts, tokens in steps:
        counts.readable = tokens.readable = True
    assert kept.recording().counts.sum() == 60 * 2 * 3 * 5


def test_a_step_outside_the_range_is_never_read():
    kept = recorder(start=1, stop=2)
    one = jnp.ones((2, 3, 5), jnp.int32), jnp.ones((2, 3), jnp.int32)
    for step in [(unread(0), unread(0)), one, (unread(0), unread(0))]:
        kept.record(*step)
    assert kept.recording().iterations == (1,)


def test_a_recording_can_be_read_in_the_middle_of_a_run():
    kept = recorder()
    one = jnp.ones((2, 3, 5), jnp.int32), jnp.ones((2, 3), jnp.int32)
    kept.record(*one)
    assert kept.recording().iterations == (0,)
    kept.record(*one)
    assert kept.recording().iterations == (0, 1)


def test_counts_past_int32_are_added_in_int64():
    kept = recorder()
    kept.record(jnp.full((4, 3, 5), 2**30, jnp.int32), jnp.ones((4, 3), jnp.int32))
    assert kept.recording().counts.max() == 2**32
