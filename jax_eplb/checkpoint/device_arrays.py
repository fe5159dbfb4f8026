"""Between arrays on devices and chunks on disk, each device by itself.

Axes: L layers, E experts, S slots. Of a bank, a device writes the experts that it is the first to
hold, and reads those that its slots hold; of any other array, its own part.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eplb.checkpoint.array_files import ArrayLayout, StoredArray, cut
from jax_eplb.checkpoint.banks import Bank, first_slots
from jax_eplb.checkpoint.tree_names import Key
from jax_eplb.placement import Placement

_READERS = 8  # threads; a read waits for the disk more than it computes


def array_layout(keys: tuple[Key, ...], leaf: Any) -> ArrayLayout:
    """How an array without experts is cut. Raises ValueError for what is no plain array."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"{keys[-1].text}: save jax.random.key_data(key) instead of the key")
    local = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else None
    shape = np.shape(leaf)
    return cut(keys, shape, np.asarray(leaf).dtype if dtype is None else dtype, local)


def bank_layout(keys: tuple[Key, ...], leaf: jax.Array, bank: Bank, num_experts: int):
    """A bank in expert order, an expert a chunk; or the part that a device holds, where devices
    share an expert."""
    axis = bank.expert_axis
    inner = leaf.sharding.shard_shape(leaf.shape)[axis + 1 :]
    shape = (*leaf.shape[:axis], num_experts, *leaf.shape[axis + 1 :])
    return ArrayLayout(keys, shape, np.dtype(leaf.dtype), (*(1,) * (axis + 1), *inner))


def own_chunks(leaf: Any, layout: ArrayLayout) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The chunks of an array without experts that this process writes, copied to the host."""
    for start, part in _own_parts(leaf):
        grid = [-(-size // chunk) for size, chunk in zip(part.shape, layout.chunks, strict=True)]
        for place in np.ndindex(*grid):
            inside = [
                slice(i * chunk, (i + 1) * chunk)
                for i, chunk in zip(place, layout.chunks, strict=True)
            ]
            index = [
                s // chunk + i for s, chunk, i in zip(start, layout.chunks, place, strict=True)
            ]
            yield tuple(index), np.array(part[tuple(inside)])


def own_experts(
    leaf: jax.Array, layout: ArrayLayout, bank: Bank, placement: Placement
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The chunks of a bank that this process writes: the experts it is the first to hold."""
    axis = bank.expert_axis
    first = first_slots(bank.rows(placement), placement.num_experts)  # [L, E]
    for start, part in _own_parts(leaf):
        inner = [s // c for s, c in zip(start[axis + 1 :], layout.chunks[axis + 1 :], strict=True)]
        layers = range(start[0], start[0] + part.shape[0]) if bank.stacked else range(1)
        slots = range(start[axis], start[axis] + part.shape[axis])
        for layer in layers:
            held = np.flatnonzero((first[layer] >= slots.start) & (first[layer] < slots.stop))
            for expert in held.tolist():
                row = part[layer - start[0]] if bank.stacked else part
                weights = np.array(row[first[layer, expert] - slots.start])
                yield (*bank.outer(layer, expert), *inner), weights.reshape(layout.chunks)


def load_array(
    stored: StoredArray, like: Any, table: np.ndarray | None, stacked: bool
) -> tuple[Any, dict[Any, int]]:
    """Read an array for the devices of `like`, and the bytes that each of them read.

    `table`, int32[L, S], says which expert each slot of a bank holds; None for other arrays. A part
    that several devices hold alike is read once, unless it is of a bank.
    """

    def read(index) -> tuple[np.ndarray, int]:
        if table is None:
            out, size = stored.read(index)
        else:
            out, size = _read_slots(stored, index, table, stacked)
        return out.astype(getattr(like, "dtype", out.dtype), copy=False), size

    if getattr(like, "sharding", None) is None:
        out, size = read([slice(0, n) for n in np.shape(like)])
        return out, {None: size}
    parts, bytes_read, known = [], {}, {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        part = known.get(str(index))
        if part is None:
            part, bytes_read[device] = read(index)
            if table is None:
                known[str(index)] = part
        parts.append(jax.device_put(part, device))
    array = jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)
    return array, bytes_read


def _read_slots(
    stored: StoredArray, index: Any, table: np.ndarray, stacked: bool
) -> tuple[np.ndarray, int]:
    """A device's part of a bank: the experts of its slots, each read once."""
    axis = int(stacked)
    layers = range(len(table))[index[0]] if stacked else range(1)
    slots = range(table.shape[1])[index[axis]]
    inner = tuple(index[axis + 1 :])
    shape = stored.layout.shape
    sizes = [len(range(n)[part]) for n, part in zip(shape[axis + 1 :], inner, strict=True)]
    out = np.zeros((len(layers), len(slots), *sizes), stored.layout.dtype)  # empty slots: zeros

    def read(place: tuple[int, int]) -> int:
        row, expert = place
        layer = layers[row]
        outer = (slice(layer, layer + 1),) if stacked else ()
        weights, size = stored.read((*outer, slice(expert, expert + 1), *inner))
        out[row, held[row] == expert] = weights.reshape(sizes)
        return size

    held = table[layers.start : layers.stop, slots.start : slots.stop]
    places = [
        (row, int(expert))
        for row in range(len(layers))
        for expert in np.unique(held[row])
        if expert < shape[axis]
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        total = sum(pool.map(read, places))
    return (out if stacked else out[0]), total


def _own_parts(leaf: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The parts of an array that this process writes, each with its first position."""
    is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if not isinstance(leaf, jax.Array) or (is_local and jax.process_count() > 1):
        if jax.process_index() == 0:  # all processes hold the same
            yield (0,) * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            # Read through a second array: the host copy is kept as long as the one it is read from.
            data = jax.make_array_from_single_device_arrays(
                shard.data.shape, shard.data.sharding, [shard.data]
            )
            yield tuple(part.start or 0 for part in shard.index), np.asarray(data)
