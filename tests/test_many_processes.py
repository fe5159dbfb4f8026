"""The layer over several processes: the same bytes as in one."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_layer(processes: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.layer_process"]
    started = [
        subprocess.Popen(
            [*command, str(process), str(processes), str(port), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_one_two_and_four_processes_compute_the_same_bytes(tmp_path):
    for processes in (1, 2, 4):
        run_layer(processes, tmp_path)
    for start in (0, 16, 32, 48):
        rows = [np.load(tmp_path / f"rows_{n}_{start}.npy") for n in (1, 2, 4)]
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(rows[0], rows[2])
    for name in ("counts", "ranks"):
        counts = [np.load(tmp_path / f"{name}_{n}.npy") for n in (1, 2, 4)]
        assert counts[0].sum() == 64 * 2
        np.testing.assert_array_equal(counts[0], counts[1])
        np.testing.assert_array_equal(counts[0], counts[2])
