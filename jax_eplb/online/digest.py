"""A cheap digest of what a process decided, compared across processes before any weight moves.

Each process plans for itself and gets the same plan, since it plans from the same numbers with the
same program. Where that fails (another version of a library, another kind of CPU) weights would be
mixed up silently; so it is checked, and a difference stops the run. Digests travel on the devices,
between two steps, and are read an iteration later, so that nobody waits for them.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb.online.errors import DigestMismatch

# From this process's values to those of all processes, [processes, ...]: an array, perhaps of JAX
# and still on its way. A collective call, which every process makes at the same iteration.
Gather = Callable[[np.ndarray], Any]


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


class Question(NamedTuple):
    """Whether all processes decided alike, asked of them before an iteration."""

    iteration: int
    own: np.ndarray  # uint32[2]
    all_of_them: Any  # uint32[processes, 2], perhaps on its way


def ask(iteration: int, table: np.ndarray, capacity: np.ndarray, gather: Gather) -> Question:
    """Send this process's digest to all others, and ask for theirs. Only dispatches."""
    own = digest(iteration, table, capacity)
    return Question(iteration, own, gather(own))


def check_agreement(question: Question) -> None:
    """Wait for the answer. Raises DigestMismatch unless all processes decided on the same."""
    all_of_them = np.asarray(question.all_of_them).reshape(-1, question.own.size)
    differs = (all_of_them != question.own).any(axis=1)
    if differs.any():
        raise DigestMismatch(
            f"iteration {question.iteration}: process {jax.process_index()} decided on another "
            f"placement than process {np.flatnonzero(differs).tolist()}; nothing was moved. All "
            "processes need the same counts and calls, the same version of jax_eplb and JAX, and "
            "CPUs of one kind"
        )


def from_first_process(values: np.ndarray) -> np.ndarray:
    """Process 0's values on every process: for what each would measure differently."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def gather_on_devices(values: np.ndarray) -> jax.Array:
    """A `Gather` by a device of each process; it follows the steps that were dispatched before."""
    mesh = _one_device_each()
    shape, spread = (mesh.size, *values.shape), NamedSharding(mesh, P("process"))
    own = jax.make_array_from_callback(shape, spread, lambda index: values[None])
    return _replicated(own, mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def _replicated(values: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, P()))


@functools.cache
def _one_device_each() -> Mesh:
    first = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
