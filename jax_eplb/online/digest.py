"""A cheap digest of what a process decided, compared across processes before any weight moves.

Each process plans for itself and gets the same plan, since it plans from the same numbers with the
same program. Where that fails (another version of a library, another kind of CPU) weights would be
mixed up silently; so it is checked, and a difference stops the run.
"""

import hashlib
from collections.abc import Callable

import jax
import numpy as np

from jax_eplb.online.errors import DigestMismatch

# From this process's values to those of all processes, [processes, ...].
Gather = Callable[[np.ndarray], np.ndarray]


def digest(iteration: int, table: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """uint32[2] of the iteration, the placement that is to be in force, and the ranks' speeds.

    `table` int32[L, S], `capacity` float32[P].

    >>> table, speeds = np.array([[0, 1, 2, 0]]), np.ones(2)
    >>> bool((digest(7, table, speeds) == digest(7, table, speeds)).all())
    True
    >>> bool((digest(7, table, speeds) == digest(8, table, speeds)).all())
    False
    """
    values = np.ascontiguousarray(table, dtype="<i4")
    head = np.array([iteration, *values.shape], "<i8")
    speeds = np.ascontiguousarray(capacity, dtype="<f4")
    whole = head.tobytes() + values.tobytes() + speeds.tobytes()
    found = hashlib.blake2b(whole, digest_size=8).digest()
    return np.frombuffer(found, "<u4").astype(np.uint32)


def check_agreement(
    iteration: int, table: np.ndarray, capacity: np.ndarray, gather: Gather | None = None
) -> None:
    """Raise DigestMismatch unless all processes have decided on this, as `digest` has it.

    A collective call: every process makes it at the same iteration. One process has nothing to
    compare with.
    """
    if gather is None:
        if jax.process_count() == 1:
            return
        gather = _gather
    own = digest(iteration, table, capacity)
    all_of_them = np.asarray(gather(own)).reshape(-1, own.size)
    differs = (all_of_them != own).any(axis=1)
    if differs.any():
        raise DigestMismatch(
            f"iteration {iteration}: process {jax.process_index()} decided on another placement "
            f"than process {np.flatnonzero(differs).tolist()}; nothing was moved. All processes "
            "need the same counts and calls, the same version of jax_eplb and JAX, and CPUs of one "
            "kind"
        )


def from_first_process(values: np.ndarray) -> np.ndarray:
    """Process 0's values on every process: for what each would measure differently."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def _gather(values: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))
