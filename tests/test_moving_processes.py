"""Experts moved across processes: every slot right, in every array, by every process's check."""

import pytest

from tests.processes import run_together


@pytest.mark.slow
def test_thirty_placements_over_two_processes():
    for printed in run_together("tests.moving_process", 2, 4, 30, 0):
        assert printed.endswith("moved\n")


@pytest.mark.slow
def test_twelve_placements_over_four_processes():
    # As many as it takes to move in waves of one slot and of two, too; more go over two processes.
    for printed in run_together("tests.moving_process", 4, 8, 12, 2):
        assert printed.endswith("moved\n")


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
def test_a_thousand_placements_over_several_processes(processes):
    for printed in run_together("tests.moving_process", processes, 8, 1000, 1, timeout=400):
        assert printed.endswith("moved\n")
