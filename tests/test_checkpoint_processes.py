"""Two processes save one checkpoint, each the experts that it holds, and restore their parts."""

import pytest

from jax_eplb.checkpoint import Checkpoints
from tests.checkpoint_cases import assert_same, global_bank, planned, targets
from tests.processes import run_together

pytestmark = pytest.mark.light_compile


@pytest.mark.slow
def test_two_processes_save_what_one_can_read(tmp_path):
    run_together("tests.checkpoint_process", 2, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    placement = planned(24, 8)
    expected = global_bank(placement)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(targets(expected), placement).state, expected)
    by_process = [
        len((tmp_path / f"2/pytree/checksums.{n}.json").read_text().split(",")) for n in range(2)
    ]
    assert min(by_process) > 10  # of 37 chunks: neither process wrote for the other


@pytest.mark.slow
def test_where_one_process_cannot_write_both_say_so_and_the_save_before_stays(tmp_path):
    first, second = run_together("tests.checkpoint_process", 2, tmp_path, "full")
    assert "could not be written (process 1 could not write its part)" in first
    assert "could not be written (No space left on device)" in second
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
