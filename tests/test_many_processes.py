"""The layer over several processes: the same bytes as in one."""

import numpy as np
import pytest

from tests.processes import run_together


@pytest.mark.slow
def test_one_two_and_four_processes_compute_the_same_bytes(tmp_path):
    for processes in (1, 2, 4):
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
