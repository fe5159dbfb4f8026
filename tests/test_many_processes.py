"""The layer over several processes: the same bytes as in one."""

import json

import numpy as np
import pytest

from tests.capacity_process import BACK, LOST, RANKS
from tests.layer_process import apply
from tests.processes import run_together

# As the other processes compile.
pytestmark = pytest.mark.light_compile


@pytest.mark.slow
def test_one_two_and_four_processes_compute_the_same_bytes(tmp_path):
    apply(0, 1, tmp_path)
    for processes in (2, 4):
        run_together("tests.layer_process", processes, tmp_path)
    for start in (0, 16, 32, 48):
        rows = [np.load(tmp_path / f"rows_{n}_{start}.npy") for n in (1, 2, 4)]
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(rows[0], rows[2])
    for name in ("counts", "ranks"):
        counts = [np.load(tmp_path / f"{name}_{n}.npy") for n in (1, 2, 4)]
        assert counts[0].sum() == 64 * 2
        np.testing.assert_array_equal(counts[0], counts[1])
        np.testing.assert_array_equal(counts[0], counts[2])


@pytest.mark.soak  # several processes plan and move in other tests, one empties ranks in others
def test_a_rank_is_emptied_and_comes_back_in_two_processes_and_no_token_changes():
    (alone,) = map(json.loads, run_together("tests.capacity_process", 1))
    printed = run_together("tests.capacity_process", 2)
    # Gloo says who is connected before.
    first, second = (json.loads(each.splitlines()[-1]) for each in printed)
    assert first == second
    assert first["outputs"] == alone["outputs"]
    for each in (alone, first):  # several processes compare what they decided for an iteration more
        tables = np.array(each["tables"]).reshape(-1, 2, RANKS, 6)
        empty = (tables == 16).all(axis=(1, 3))  # [iterations, ranks]
        assert not empty[:LOST].any()
        assert empty[BACK - 1].tolist() == [False, False, True, False]
        assert not empty[-1].any()
