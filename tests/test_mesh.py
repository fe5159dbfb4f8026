import os
import re
import subprocess
import sys

import jax
import pytest

from jax_eplb.mesh import expert_mesh, simulate_devices


def devices_in_a_new_process(program, **environment):
    """Standard output of a program that begins without devices of its own."""
    setup = "import os; [os.environ.pop(name, 0) for name in "
    setup += "('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES', 'NPROC')]"
    setup += f"; os.environ.update({environment!r} | {{'JAX_PLATFORMS': 'cpu'}})"
    code = f"{setup}\nimport jax\nfrom jax_eplb.mesh import simulate_devices\n{program}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_a_mesh_takes_the_first_devices_or_all():
    mesh = expert_mesh(3)
    assert mesh.shape == {"expert": 3}
    assert list(mesh.devices) == jax.devices()[:3]
    assert expert_mesh(axis_name="ranks").shape == {"ranks": len(jax.devices())}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


@pytest.mark.parametrize("num_ranks", [0, -2])
def test_a_mesh_of_no_ranks_is_refused(num_ranks):
    with pytest.raises(ValueError, match=f"a mesh of {num_ranks} ranks is none; use at least 1"):
        expert_mesh(num_ranks)


def test_too_few_devices_are_refused_with_the_way_to_simulate_them():
    message = (
        "9 ranks need as many devices; there are 8 (cpu) and 8 on the CPU. To simulate them on "
        "the CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=9 and NPROC=36 (XLA's "
        "threads) before JAX is first used"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        expert_mesh(9)


@pytest.mark.parametrize("num_devices", [4, 8, 16])
def test_simulating_after_jax_has_started_changes_nothing(num_devices):
    simulate_devices(num_devices)
    assert len(jax.devices()) == 8


@pytest.mark.slow
def test_a_program_that_starts_gets_the_devices_it_asks_for():
    assert devices_in_a_new_process("simulate_devices(5); print(len(jax.devices()))") == ["5"]


@pytest.mark.slow
def test_simulated_devices_have_threads_for_collectives_that_do_not_depend_on_each_other():
    program = (
        "simulate_devices(2); jax.devices(); print(os.environ['NPROC'])\n"
        "from pathlib import Path\n"
        "print(sum('XLAEigen' in x.read_text() for x in Path('/proc/self/task').glob('*/comm')))"
    )
    cores = os.cpu_count() or 1
    assert devices_in_a_new_process(program) == [str(max(cores, 8))] * 2
    assert devices_in_a_new_process(program, NPROC="5") == ["5", "5"]


@pytest.mark.slow
def test_xla_flags_and_a_larger_setting_stand():
    program = "simulate_devices(2); print(len(jax.devices()))"
    flag = "--xla_force_host_platform_device_count=3"
    assert devices_in_a_new_process(program, XLA_FLAGS=flag) == ["3"]
    assert devices_in_a_new_process(program, JAX_NUM_CPU_DEVICES="6") == ["6"]
