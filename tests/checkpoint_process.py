"""A process that saves checkpoints, alone or as one of several.

python -m tests.checkpoint_process cut-off FOLDER
python -m tests.checkpoint_process PROCESS PROCESSES PORT FOLDER [full]
"""

import errno
import itertools
import os
import sys
import time
from pathlib import Path

import jax

RANKS = 4


def cut_off(folder: Path) -> None:
    """Save step 1, then begin step 2 and say so; its last files never come."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", RANKS)
    from jax_eplb.checkpoint import Checkpoints, array_files
    from tests.checkpoint_cases import planned, state_of

    placement = planned(16, RANKS)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state_of(placement), placement)
    checkpoints.wait()
    write, numbers = array_files.write_file, itertools.count(1)

    def slow(path, data):
        number = next(numbers)  # several threads write: each file has a number of its own
        if number > 60:
            time.sleep(600)
        write(path, data)
        if number == 60:
            print("writing", flush=True)

    array_files.write_file = slow
    checkpoints.save(2, state_of(placement), placement)
    checkpoints.wait()


def _join(process: int, processes: int, port: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", RANKS // processes)
    jax.distributed.initialize(f"localhost:{port}", processes, process)


def save_and_restore(process: int, processes: int, port: int, folder: Path) -> None:
    """Save with one placement and restore with another; every process checks its own part."""
    _join(process, processes, port)

    import numpy as np

    from jax_eplb.checkpoint import Checkpoints
    from tests.checkpoint_cases import global_bank, planned, targets

    placement, other = planned(16, RANKS), planned(20, RANKS, seed=1)
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in (1, 2):  # the second save removes the first
            checkpoints.save(step, global_bank(placement), placement, balancer={"at": np.arange(3)})
        expected = global_bank(other)
        restored = checkpoints.restore(targets(expected), other, balancer={"at": np.zeros(3, int)})
    assert restored.balancer["at"].tolist() == [0, 1, 2]
    assert len(restored.bytes_read) == RANKS // processes
    for found, right in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True
    ):
        for a, b in zip(found.addressable_shards, right.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    written = len(list((folder / "2/pytree").glob(f"checksums.{process}.json")))
    assert written == 1


def fail_together(process: int, processes: int, port: int, folder: Path) -> None:
    """The last process finds its disk full: all hear of it at once, and the save before stays."""
    _join(process, processes, port)
    from jax_eplb.checkpoint import Checkpoints, array_files
    from tests.checkpoint_cases import global_bank, planned

    placement = planned(16, RANKS)
    state = global_bank(placement)
    write = array_files.write_file

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, placement)
        checkpoints.wait()
        if process == processes - 1:
            array_files.write_file = full
        begun = time.monotonic()
        try:
            checkpoints.save(2, state, placement)
            checkpoints.wait()
        except OSError as error:
            print(error)
        assert time.monotonic() - begun < 100  # not the twenty minutes of Orbax
        assert checkpoints.steps == [1]
        array_files.write_file = write
        checkpoints.save(2, state, placement)
        checkpoints.wait()
        assert checkpoints.steps == [2]


if __name__ == "__main__":
    if sys.argv[1] == "cut-off":
        cut_off(Path(sys.argv[2]))
    else:
        run = fail_together if sys.argv[5:] == ["full"] else save_and_restore
        run(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
