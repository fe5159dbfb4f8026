"""Whole trees of arrays, to an item of a checkpoint and back."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_eplb.checkpoint.array_files import (
    StoredArray,
    write_checksums,
    write_chunk,
    write_tree,
)
from jax_eplb.checkpoint.banks import Bank, banks_of, first_slots
from jax_eplb.checkpoint.device_arrays import (
    array_layout,
    bank_layout,
    load_array,
    own_chunks,
    own_experts,
)
from jax_eplb.checkpoint.tree_names import empty_nodes, joined, named_leaves
from jax_eplb.placement import Placement

_WRITERS = 8  # threads


def copy_tree(
    tree: Any, placement: Placement | None = None, axis_name: str = ""
) -> tuple[Callable[[Path], None], dict[str, Bank]]:
    """Copy to the host what this process is to write: what writes it to a folder, and the banks.

    Without a placement no array is taken for a bank. Raises ValueError for a tree that cannot be
    saved.
    """
    leaves = named_leaves(tree)
    banks: dict[str, Bank] = {}
    layouts, chunks = [], []
    positions = {}
    if placement is not None:
        _check_complete(placement)
        positions = banks_of(tree, placement, axis_name)
    for position, (keys, leaf) in enumerate(leaves.items()):
        if position in positions and placement is not None:
            bank = banks[joined(keys)] = positions[position]
            layout = bank_layout(keys, leaf, bank, placement.num_experts)
            own = own_experts(leaf, layout, bank, placement)
        else:
            layout = array_layout(keys, leaf)
            own = own_chunks(leaf, layout)
        layouts.append(layout)
        chunks += [(layout, index, chunk) for index, chunk in own]
    empty = empty_nodes(tree)

    def write(folder: Path) -> None:
        if jax.process_index() == 0:
            write_tree(folder, layouts, empty)
        with ThreadPoolExecutor(_WRITERS) as pool:
            checksums = list(pool.map(lambda chunk: write_chunk(folder, *chunk), chunks))
        files = [layout.file(index) for layout, index, _ in chunks]
        chunks.clear()  # Orbax may hold this function longer than it runs
        write_checksums(
            folder, dict(zip(files, checksums, strict=True)), process=jax.process_index()
        )

    return write, banks


def load_tree(
    like: Any,
    arrays: Mapping[str, StoredArray],
    banks: Mapping[str, Bank] | None = None,
    placement: Placement | None = None,
) -> tuple[Any, dict[Any, int]]:
    """Read the arrays that `like` has onto its devices, and the bytes that each device read.

    Banks are laid out by the placement. Raises ValueError where an array is missing or has another
    shape.
    """
    leaves, total = [], {}
    for keys, leaf in named_leaves(like).items():
        name = joined(keys)
        if name not in arrays:
            raise ValueError(f"the array {name!r} is not in this checkpoint")
        bank, shape = (banks or {}).get(name), arrays[name].layout.shape
        table = None
        if bank is not None and placement is not None:
            table = bank.rows(placement)
            axis = bank.expert_axis
            shape = (*shape[:axis], placement.num_slots, *shape[axis + 1 :])
        if np.shape(leaf) != shape:
            raise ValueError(
                f"{name!r} has shape {np.shape(leaf)}, but this checkpoint has {shape}"
                + ("" if bank is None else f" when it is laid out in {shape[axis]} slots")
            )
        stacked = bank is not None and bank.stacked
        array, bytes_read = load_array(arrays[name], leaf, table, stacked)
        leaves.append(array)
        for device, size in bytes_read.items():
            total[device] = total.get(device, 0) + size
    return jax.tree.unflatten(jax.tree.structure(like), leaves), total


def _check_complete(placement: Placement) -> None:
    first = first_slots(np.asarray(placement.slot_to_expert), placement.num_experts)
    missing = np.argwhere(first == placement.num_slots)
    if missing.size:
        layer, expert = missing[0]
        raise ValueError(
            f"layer {placement.layer_ids[layer]}: expert {expert} has no slot, so its weights "
            "cannot be saved"
        )
