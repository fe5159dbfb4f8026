import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_package_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "jax_eplb", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("usage: jax-eplb")
    assert ended.stderr == ""
    for name in ("demo", "report", "plan", "run"):
        assert name in ended.stdout


@pytest.mark.slow
def test_the_exit_code_is_the_commands():
    command = [sys.executable, "-m", "jax_eplb", "report", "none.npz", "--ep-size", "4"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "jax-eplb report: error: none.npz: no such file or directory\n"
