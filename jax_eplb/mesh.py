"""The mesh that experts are spread over, what lies on it, and simulated devices."""

import functools
import os
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

# A collective holds one of XLA's threads until all devices have come to it, and a device may be in
# several that do not depend on each other. XLA has as many threads as devices or cores, unless
# NPROC says how many; where they are too few, devices wait for each other for ever.
_THREADS_OF_A_DEVICE = 4


def simulate_devices(num_devices: int) -> None:
    """Let the CPU count as so many devices, for a program that starts; accelerators stay first.

    With threads enough for them, by NPROC, unless it is set. Does nothing else where XLA_FLAGS, or
    JAX's own setting, ask for as many already, or where JAX has been used before, which settles the
    number of devices: `expert_mesh` says if they are too few.
    """
    if num_devices > 1:
        threads = max(os.cpu_count() or 1, _THREADS_OF_A_DEVICE * num_devices)
        os.environ.setdefault("NPROC", str(threads))
    by_flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or jax.config.values["jax_num_cpu_devices"] >= num_devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        return  # JAX has started


def expert_mesh(num_ranks: int | None = None, axis_name: str = "expert") -> Mesh:
    """A mesh of one axis over the first `num_ranks` devices (default: all).

    Where there are too few accelerators but enough CPU devices, it is made of those. Raises
    ValueError where there are too few of both.
    """
    devices = jax.devices()
    num_ranks = len(devices) if num_ranks is None else num_ranks
    if num_ranks < 1:
        raise ValueError(f"a mesh of {num_ranks} ranks is none; use at least 1")
    if len(devices) < num_ranks:
        devices = jax.devices("cpu")
    if len(devices) < num_ranks:
        raise ValueError(
            f"{num_ranks} ranks need as many devices; there are {len(jax.devices())} "
            f"({jax.default_backend()}) and {len(devices)} on the CPU. To simulate them on the "
            f"CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={num_ranks} and "
            f"NPROC={_THREADS_OF_A_DEVICE * num_ranks} (XLA's threads) before JAX is first used"
        )
    return jax.make_mesh(
        (num_ranks,),
        (axis_name,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices[:num_ranks],
    )


@functools.cache
def one_process(mesh: Mesh) -> bool:
    """Whether all devices of the mesh belong to one process."""
    return len({device.process_index for device in mesh.devices.flat}) == 1


def lay_out(host: Any, sharding: Any) -> Any:
    """Host arrays, the same on every process, on the devices; waits for no other process.

    `host`: an array or a tree of them; `sharding`: one for all, or a tree like theirs.
    """
    if all(each.is_fully_addressable for each in jax.tree.leaves(sharding)):
        return jax.device_put(host, sharding)
    if isinstance(sharding, Sharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, host)
    # `device_put` would compare them across processes, which waits for them.
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]),
        host,
        sharding,
    )
