"""A source's arrays written as safetensors, in expert order or each rank's slots in one file.

Axes: L layers, E experts, S slots, N slots of a rank.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_eplb.checkpoint.array_files import MAX_CHUNK_BYTES
from jax_eplb.checkpoint.expert_names import tensor_name
from jax_eplb.checkpoint.sources import CHECKSUMS, ArraySource, BankSource, Source
from jax_eplb.checkpoint.tensor_files import (
    Checksums,
    TensorSpec,
    TensorWriter,
    check_pieces,
    read_header,
    write_index,
)
from jax_eplb.checkpoint.tree_names import joined
from jax_eplb.placement import Placement

MAX_FILE_BYTES = 5_000_000_000  # but a tensor is never split

# Of each layer of a bank: (number, expert) of the slots, or experts, that a file holds.
Rows = Sequence[Sequence[tuple[int, int]]]


class PlannedTensor(NamedTuple):
    """A tensor to be written: the experts that follow each other in it, or another array."""

    spec: TensorSpec
    source: BankSource | ArraySource
    experts: list[tuple[int, int]]  # (row of the bank's layers, expert)


def plan_files(source: Source, placement: Placement, layout: str) -> dict[str, list[PlannedTensor]]:
    """What each file will hold. `layout`: "experts" or "slots"."""
    others = [
        PlannedTensor(TensorSpec(joined(each.keys), each.dtype, each.shape), each, [])
        for each in source.others
    ]
    if layout == "experts":
        in_order = [(expert, expert) for expert in range(source.num_experts)]
        banks = [
            tensor
            for bank in source.banks
            for tensor in _plan_bank(bank, [in_order] * len(bank.bank.layers))
        ]
        return _split("model", banks + others)
    files = {}
    for rank in range(placement.num_ranks):
        first = rank * placement.slots_per_rank
        held = range(first, first + placement.slots_per_rank)
        files[f"rank-{rank:05d}.safetensors"] = [
            tensor
            for bank in source.banks
            for tensor in _plan_bank(
                bank,
                [
                    [(slot, int(table[slot])) for slot in held if table[slot] < bank.num_experts]
                    for table in bank.bank.rows(placement)
                ],
            )
        ]
    return files | _split("others", others)


def write_files(
    source: Source,
    files: dict[str, list[PlannedTensor]],
    folder: Path,
    *,
    with_index: bool,
    on_progress: Callable[[int], None],
) -> None:
    """Write the files, read them back, and compare. Raises ValueError where they differ."""
    metadata = dict(source.metadata) or {"format": "pt"}
    if source.facts is not None:
        metadata["facts"] = json.dumps(source.facts)
    checksums: dict[str, dict[str, Checksums]] = {}
    for other in source.others:
        other.check()
    for file, tensors in files.items():
        specs = [tensor.spec for tensor in tensors]
        with TensorWriter(folder / file, specs, metadata) as writer:
            checksums[file] = {
                tensor.spec.name: _write(tensor, writer, on_progress) for tensor in tensors
            }
    (folder / CHECKSUMS).write_text(json.dumps(checksums))
    for file, expected in checksums.items():
        written, _ = read_header(folder / file)
        for name, tensor in written.items():
            check_pieces(name, tensor, expected[name])
    if with_index and len(files) > 1:
        names = {tensor.spec.name: file for file, tensors in files.items() for tensor in tensors}
        total = sum(tensor.spec.nbytes for tensors in files.values() for tensor in tensors)
        write_index(folder, names, total)


def _plan_bank(source: BankSource, rows: Rows) -> Iterator[PlannedTensor]:
    """The tensors of a bank, named and shaped as its template has it."""
    template = source.bank.template or joined(source.keys)
    layers = source.bank.layers
    if "{expert}" in template:
        for row, layer in enumerate(layers):
            for number, expert in rows[row]:
                name = tensor_name(template, layer, number)
                spec = TensorSpec(name, source.dtype, source.shape)
                yield PlannedTensor(spec, source, [(row, expert)])
    elif "{layer}" in template:
        for row, layer in enumerate(layers):
            spec = TensorSpec(
                tensor_name(template, layer, 0), source.dtype, (len(rows[row]), *source.shape)
            )
            yield PlannedTensor(spec, source, [(row, expert) for _, expert in rows[row]])
    else:
        outer = source.bank.outer(len(layers), len(rows[0]))
        experts = [(row, expert) for row in range(len(layers)) for _, expert in rows[row]]
        yield PlannedTensor(
            TensorSpec(template, source.dtype, (*outer, *source.shape)), source, experts
        )


def _split(name: str, tensors: list[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """Files of at most 5 GB, unless one tensor is larger."""
    parts: list[list[PlannedTensor]] = []
    size = MAX_FILE_BYTES
    for tensor in tensors:
        if size + tensor.spec.nbytes > MAX_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.spec.nbytes
    if len(parts) == 1:
        return {f"{name}.safetensors": parts[0]}
    return {
        f"{name}-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def _write(
    tensor: PlannedTensor, writer: TensorWriter, on_progress: Callable[[int], None]
) -> Checksums:
    source = tensor.source
    if isinstance(source, BankSource):
        piece_bytes = source.expert_bytes
        pieces = (source.read(row, expert) for row, expert in tensor.experts)
    else:
        rows = source.shape[0] if source.shape else 1
        row_bytes = math.prod(source.shape[1:]) * source.dtype.itemsize
        step = max(MAX_CHUNK_BYTES // max(row_bytes, 1), 1)
        piece_bytes = step * row_bytes
        pieces = (
            source.read(row, min(row + step, rows)) for row in range(0, rows, step) if row_bytes
        )
    checksums, offset = [], 0
    for piece in pieces:
        writer.write(tensor.spec.name, piece, offset)
        checksums.append(zlib.crc32(piece.data))
        offset += piece.nbytes
        on_progress(piece.nbytes)
    return Checksums(piece_bytes, checksums)
