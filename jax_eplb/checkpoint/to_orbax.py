"""A source's arrays written as an item of an Orbax checkpoint, one chunk at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jax_eplb.checkpoint.array_files import (
    ArrayLayout,
    cut,
    open_tree,
    write_checksums,
    write_chunk,
    write_tree,
)
from jax_eplb.checkpoint.sources import ArraySource, BankSource, Source


def write_item(source: Source, folder: Path, on_progress: Callable[[int], None]) -> None:
    """Write all arrays, read them back, and compare. Raises ValueError where they differ."""
    banks = [(each, _bank_layout(each)) for each in source.banks]
    others = [(each, cut(each.keys, each.shape, each.dtype)) for each in source.others]
    empty = {} if source.stored is None else source.stored.empty
    write_tree(folder, [layout for _, layout in banks + others], empty)
    checksums = {}
    for bank, layout in banks:
        for row in range(len(bank.bank.layers)):
            for expert in range(bank.num_experts):
                index = (*bank.bank.outer(row, expert), *(0 for _ in bank.shape))
                chunk = bank.read(row, expert).view(layout.dtype).reshape(layout.chunks)
                checksums[layout.file(index)] = write_chunk(folder, layout, index, chunk)
                on_progress(chunk.nbytes)
    for array, layout in others:
        array.check()
        for index in np.ndindex(*layout.grid):
            chunk = _chunk(array, layout, index)
            checksums[layout.file(index)] = write_chunk(folder, layout, index, chunk)
            on_progress(chunk.nbytes)
    write_checksums(folder, checksums)
    for stored in open_tree(folder).arrays.values():
        stored.check()


def _bank_layout(source: BankSource) -> ArrayLayout:
    outer = source.bank.outer(len(source.bank.layers), source.num_experts)
    chunks = (*(1 for _ in outer), *source.shape)
    return ArrayLayout(source.keys, (*outer, *source.shape), source.dtype, chunks)


def _chunk(source: ArraySource, layout: ArrayLayout, index: tuple[int, ...]) -> np.ndarray:
    if not source.shape:
        return source.read(0, 1).view(source.dtype).reshape(())
    rows = layout.chunks[0]
    start, stop = index[0] * rows, min((index[0] + 1) * rows, source.shape[0])
    return source.read(start, stop).view(source.dtype).reshape(stop - start, *source.shape[1:])
