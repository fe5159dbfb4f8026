"""A command that several processes run together, as one program over all their devices."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from jax_eplb.commands.inputs import option_name
from jax_eplb.mesh import simulate_devices
from jax_eplb.online import BalancerError

# What says where the processes find each other: all of it, or nothing, which lets JAX find out.
_PLACE = ("coordinator", "num_processes", "process_id")
_LAST_WORDS = 2.0  # seconds


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """With `--distributed`, join the other processes and leave them at the end.

    Whatever fails in between ends this process at once with exit code 1: the others wait for it in
    a collective, and where JAX closes in good order it would wait for them. They hear of it from
    the network at once, or from the coordinator after `--heartbeat-timeout`. Raises ValueError
    where the options do not fit together, or no cluster is found.
    """
    given = [name for name in _PLACE if getattr(arguments, name) is not None]
    if not arguments.distributed:
        if given:
            raise ValueError(f"{option_name(given[0])} is for several processes: add --distributed")
        simulate_devices(arguments.ep_size)
        yield
        return
    if given and len(given) < len(_PLACE):
        missing = next(name for name in _PLACE if name not in given)
        raise ValueError(
            f"{option_name(given[0])} needs {option_name(missing)}, too; or none of them, under "
            "SLURM, Open MPI or Kubernetes"
        )
    if given:
        _simulate_own_part(arguments.ep_size, arguments.num_processes)
    _keep_standard_output()
    try:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            heartbeat_timeout_seconds=arguments.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed: the processes did not find each other: {error}") from None
    try:
        yield
    except BaseException as error:
        where = f"process {jax.process_index()} of {jax.process_count()}"
        if not isinstance(error, ValueError | OSError | BalancerError):
            traceback.print_exc()
        print(f"jax-eplb {arguments.command}: error: {where}: {error}", file=sys.stderr, flush=True)
        if is_first():
            # With it goes the coordinator, which ends whoever is left: they may have more to say.
            time.sleep(_LAST_WORDS)
        os._exit(1)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes what one of them has to write."""
    return jax.process_index() == 0


def check_covered(mesh: Mesh) -> None:
    """Raise ValueError where a process has no device in the mesh: it would have nothing to run."""
    idle = set(range(jax.process_count())) - {d.process_index for d in mesh.devices.flat}
    if idle:
        raise ValueError(
            f"--ep-size {mesh.size} leaves process {min(idle)} without a device; there are "
            f"{jax.device_count()} devices in {jax.process_count()} processes: use them all"
        )


def _keep_standard_output() -> None:
    """For what Python prints: Gloo, in C++, says there who is connected, which is no JSON."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding)


def _simulate_own_part(ep_size: int, num_processes: int) -> None:
    """On the CPU each process simulates its share of the devices."""
    if ep_size % num_processes:
        raise ValueError(
            f"--ep-size {ep_size} is not divisible by --num-processes {num_processes}; every "
            "process has as many devices"
        )
    simulate_devices(ep_size // num_processes)
