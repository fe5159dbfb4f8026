"""Two processes save one checkpoint, each the experts that it holds, and restore their parts."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jax_eplb.checkpoint import Checkpoints
from tests.checkpoint_cases import assert_same, global_bank, planned, targets

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_processes_save_what_one_can_read(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.checkpoint_process"]
    started = [
        subprocess.Popen(
            [*command, str(process), "2", str(port), str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    placement = planned(24, 8)
    expected = global_bank(placement)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(targets(expected), placement).state, expected)
    by_process = [
        len((tmp_path / f"2/pytree/checksums.{n}.json").read_text().split(",")) for n in range(2)
    ]
    assert min(by_process) > 10  # of 37 chunks: neither process wrote for the other
