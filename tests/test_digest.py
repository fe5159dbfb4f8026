"""The digest of a decision, and what happens where processes differ."""

import numpy as np
import pytest

from jax_eplb.online import DigestMismatch
from jax_eplb.online.digest import (
    ask,
    check_agreement,
    digest,
    from_first_process,
    gather_on_devices,
)

TABLE, SPEEDS = np.arange(12).reshape(2, 6), np.array([1.0, 0.5, 1.0])


def test_any_slot_the_iteration_and_any_speed_change_the_digest():
    seen = {
        digest(5, TABLE, SPEEDS).tobytes(),
        digest(6, TABLE, SPEEDS).tobytes(),
        digest(5, TABLE.T, SPEEDS).tobytes(),
    }
    for at in np.ndindex(TABLE.shape):
        other = TABLE.copy()
        other[at] += 1
        seen.add(digest(5, other, SPEEDS).tobytes())
    for rank in range(3):
        other = SPEEDS.copy()
        other[rank] = 0
        seen.add(digest(5, TABLE, other).tobytes())
    assert len(seen) == 3 + TABLE.size + 3


def test_the_type_and_the_layout_of_the_table_do_not():
    for same in (TABLE.astype(np.int64), TABLE.astype(np.int32), np.asfortranarray(TABLE)):
        np.testing.assert_array_equal(digest(5, same, SPEEDS), digest(5, TABLE, SPEEDS))


def test_processes_that_agree_go_on():
    check_agreement(ask(5, TABLE, SPEEDS, lambda own: np.stack([own, own])))


def test_a_process_that_differs_is_named_before_anything_moves():
    other = digest(5, TABLE[::-1], SPEEDS)
    with pytest.raises(DigestMismatch, match=r"iteration 5: .* than process \[1\]; nothing was mo"):
        check_agreement(ask(5, TABLE, SPEEDS, lambda own: np.stack([own, other, own])))


def test_a_process_alone_hears_itself_from_the_devices():
    question = ask(5, TABLE, SPEEDS, gather_on_devices)
    np.testing.assert_array_equal(question.all_of_them, question.own[None])
    check_agreement(question)
    assert from_first_process(np.array([1.5])).tolist() == [1.5]
