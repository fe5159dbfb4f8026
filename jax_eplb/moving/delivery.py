"""Rows that were read on their ranks, sent to the ranks that will hold them.

Axes: P ranks, M rows of a rank.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jax_eplb.mesh import one_process
from jax_eplb.moving.banks import Spread, columns
from jax_eplb.moving.exchange import exchange_rows
from jax_eplb.moving.rows import Rows


class Route(NamedTuple):
    """Row `out` of rank `sender` becomes row `into` of rank `receiver`; arrays [M]."""

    sender: np.ndarray
    out: np.ndarray
    receiver: np.ndarray
    into: np.ndarray


class Hosted(NamedTuple):
    """A row from the host, to become row `into` of rank `receiver`."""

    receiver: int
    into: int
    packs: Sequence[Sequence[Any]]  # [column][pack]: [1, width of a device]


def crosses(spread: Spread, sender: np.ndarray, receiver: np.ndarray) -> np.ndarray:
    """bool[M]: which rows go to devices of another process."""
    if one_process(spread.mesh):
        return np.zeros(sender.size, bool)
    devices = columns(spread.mesh, spread.axis_name)
    process = np.vectorize(lambda device: device.process_index)(devices)  # [P, others]
    return (process[sender] != process[receiver]).any(axis=1)


def deliver(
    rows: Rows,
    route: Route,
    spread: Spread,
    specs: tuple[Any, ...],
    hosted: Sequence[Hosted] = (),
    *,
    collective: bool = False,
) -> Rows:
    """The rows as the receivers get them; `specs` are those of the packs. Only dispatches.

    By copies between the devices of a process, which run beside its programs, and from the host;
    or by one collective program, the only way across processes. Places that nothing goes to keep
    what was read there; it is written nowhere.
    """
    if not collective:
        return _copy(rows, route, spread, hosted)
    origin = np.zeros((spread.num_ranks, len(rows), 2), np.int32)
    origin[..., 0] = np.arange(spread.num_ranks)[:, None]  # what is not needed stays
    origin[route.receiver, route.into] = np.stack([route.sender, route.out], axis=1)
    return exchange_rows(rows, origin, spread=spread, specs=specs)


def from_host(piece, device: Any) -> jax.Array:
    """A row of the host, pinned or not, in the device's own memory."""
    kind = device.default_memory().kind
    return jax.device_put(piece, SingleDeviceSharding(device, memory_kind=kind))


def _copy(rows: Rows, route: Route, spread: Spread, hosted) -> Rows:
    devices = columns(spread.mesh, spread.axis_name)
    place = places(spread.mesh)
    pieces = [[[x.addressable_data(i) for i in range(len(place))] for x in row] for row in rows]
    arrived = [[list(shards) for shards in row] for row in pieces]
    for sender, out, receiver, into in zip(*route, strict=True):
        for source, target in zip(devices[sender], devices[receiver], strict=True):
            if target not in place:
                continue
            for pack, shards in enumerate(pieces[out]):
                piece = shards[place[source]]
                if source != target:
                    piece = jax.device_put(piece, target)
                arrived[into][pack][place[target]] = piece
    for row in hosted:
        for column, target in enumerate(devices[row.receiver]):
            if target in place:
                for pack, piece in enumerate(row.packs[column]):
                    arrived[row.into][pack][place[target]] = from_host(piece, target)
    return [
        [
            jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
            for x, shards in zip(row, shards_of, strict=True)
        ]
        for row, shards_of in zip(rows, arrived, strict=True)
    ]


@functools.lru_cache
def places(mesh: Mesh) -> dict[Any, int]:
    """Of this process's devices: which of an array's addressable shards each has."""
    own = jax.process_index()
    here = [device for device in mesh.devices.flat if device.process_index == own]
    return {device: index for index, device in enumerate(here)}
