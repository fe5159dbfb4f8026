"""A checkpoint of either kind as a source of experts: opened without reading its weights.

Axes: L layers, E experts.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_eplb.checkpoint.array_files import StoredArray, read_json
from jax_eplb.checkpoint.banks import Bank
from jax_eplb.checkpoint.expert_names import ExpertTensors, find_experts
from jax_eplb.checkpoint.stored import (
    DESCRIPTION,
    StoredCheckpoint,
    banks_from_json,
    open_checkpoint,
    placement_from_json,
    step_folders,
)
from jax_eplb.checkpoint.tensor_files import (
    INDEX,
    Checksums,
    Tensor,
    check_piece,
    check_pieces,
    open_tensors,
    read_range,
)
from jax_eplb.checkpoint.tree_names import Key
from jax_eplb.placement import Placement

NOTES = "jax_eplb.json"  # beside safetensors: the placement, and the order of the experts
CHECKSUMS = "checksums.json"  # beside safetensors: by file and tensor
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


class BankSource(NamedTuple):
    """Experts of one kind, such as all up projections."""

    keys: tuple[Key, ...]
    bank: Bank
    num_experts: int
    shape: tuple[int, ...]  # of one expert
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  # (row of the bank's layers, expert) -> uint8[bytes]

    @property
    def expert_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.bank.layers) * self.num_experts * self.expert_bytes


class ArraySource(NamedTuple):
    """An array without experts."""

    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    # Rows [start, stop) -> uint8[bytes]; an array without axes has one row.
    read: Callable[[int, int], np.ndarray]
    check: Callable[[], None]  # raises ValueError where it is damaged

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(NamedTuple):
    """A checkpoint to read from."""

    path: Path
    kind: str  # "orbax" or "safetensors"
    banks: list[BankSource]
    others: list[ArraySource]
    placement: Placement | None  # the one beside it
    facts: Any
    stored: StoredCheckpoint | None  # where it is Orbax's
    metadata: dict[str, str]  # of safetensors

    @property
    def num_experts(self) -> int:
        return self.banks[0].num_experts

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return tuple(sorted({layer for source in self.banks for layer in source.bank.layers}))

    @property
    def expert_bytes(self) -> int:
        return sum(source.nbytes for source in self.banks)

    @property
    def other_bytes(self) -> int:
        return sum(source.nbytes for source in self.others)


def open_source(path: Path, step: int | None = None) -> Source:
    """Open a folder of checkpoints (its last step, or `step`), the folder of one step, a
    safetensors file, or a folder of them.

    Raises ValueError where it is none of these, is damaged, or holds its experts by slot.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    steps = {n: f for n, f in step_folders(path).items() if (f / DESCRIPTION).exists()}
    if steps:
        if step is not None and step not in steps:
            raise ValueError(f"{path}: no step {step}; there are {list(steps)}")
        source = _from_orbax(path, open_checkpoint(steps[max(steps) if step is None else step]))
    elif (path / DESCRIPTION).exists():
        source = _from_orbax(path, open_checkpoint(path))
    elif path.is_file() or any(path.glob("*.safetensors")):
        source = _from_safetensors(path)
    else:
        raise ValueError(
            f"{path}: neither checkpoints of jax_eplb (folders named by their step) nor "
            "safetensors files"
        )
    numbers = {bank.num_experts for bank in source.banks}
    if len(numbers) != 1:
        raise ValueError(f"{path}: banks of {sorted(numbers)} experts; a model has one number")
    return source


def _from_orbax(path: Path, stored: StoredCheckpoint) -> Source:
    banks, others = [], []
    for name, array in stored.arrays.items():
        layout = array.layout
        bank = stored.banks.get(name)
        if bank is None:
            read = functools.partial(_read_rows, array)
            others.append(ArraySource(layout.keys, layout.shape, layout.dtype, read, array.check))
            continue
        axis = bank.expert_axis
        read = functools.partial(_read_expert, array, bank.stacked)
        shape = layout.shape[axis + 1 :]
        banks.append(BankSource(layout.keys, bank, layout.shape[axis], shape, layout.dtype, read))
    if not banks:
        raise ValueError(f"{stored.folder}: was saved without a placement: it has no experts")
    return Source(path, "orbax", banks, others, stored.placement, stored.facts, stored, {})


def _from_safetensors(path: Path) -> Source:
    folder = path if path.is_dir() else path.parent
    placement, known = _read_notes(folder / NOTES)
    tensors, metadata = open_tensors(path)
    try:
        facts = json.loads(metadata.get("facts", "null"))
    except ValueError:
        facts = None  # another program's
    model = facts.get("model") if isinstance(facts, dict) else None
    first = model.get("num_dense_layers", 0) if isinstance(model, dict) else 0
    try:
        found, rest = find_experts(tensors, first, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    checksums = _read_checksums(folder / CHECKSUMS)
    banks = [_bank_source(name, experts, checksums) for name, experts in found.items()]
    others = [
        ArraySource(
            (Key(name),),
            tensor.shape,
            tensor.dtype,
            functools.partial(_read_tensor_rows, tensor),
            functools.partial(_check_tensor, name, tensor, checksums),
        )
        for name, tensor in rest.items()
    ]
    return Source(path, "safetensors", banks, others, placement, facts, None, metadata)


def _read_notes(path: Path) -> tuple[Placement | None, dict[str, Bank]]:
    """The placement beside safetensors, and the banks that are one tensor each."""
    if not path.exists():
        return None, {}
    notes = read_json(path)
    try:
        if notes["layout"] == "slots":
            raise ValueError(
                "its experts are in slot order; give the checkpoint that it was made from"
            )
        placement = placement_from_json(notes["placement"])
        banks = banks_from_json(notes["banks"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fault = str(error) if isinstance(error, ValueError) else f"damaged ({error!r})"
        raise ValueError(f"{path}: {fault}") from None
    return placement, {name: bank for name, bank in banks.items() if bank.template is None}


def side_files(path: Path) -> list[Path]:
    """What stands beside the weights, such as the model's configuration and its tokenizer."""
    if not path.is_dir():
        return []
    own = (INDEX, NOTES, CHECKSUMS)
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    return [file for file in files if file.suffix not in _WEIGHTS and file.name not in own]


def _bank_source(
    name: str, experts: ExpertTensors, checksums: dict[tuple[str, str], Checksums]
) -> BankSource:
    size = math.prod(experts.shape) * experts.dtype.itemsize

    def read(row: int, expert: int) -> np.ndarray:
        tensor, at, own_name = experts.tensors[row, expert]
        data = read_range(tensor, at * size, size)
        expected = checksums.get((tensor.file.name, own_name))
        if expected is not None:
            check_piece(own_name, tensor, expected, at, data)
        return data

    return BankSource(
        (Key(name),), experts.bank, experts.num_experts, experts.shape, experts.dtype, read
    )


def _check_tensor(name: str, tensor: Tensor, checksums: dict[tuple[str, str], Checksums]) -> None:
    expected = checksums.get((tensor.file.name, name))
    if expected is not None:
        check_pieces(name, tensor, expected)


def _read_checksums(path: Path) -> dict[tuple[str, str], Checksums]:
    """Checksums by file and tensor, where the checkpoint was written here."""
    if not path.exists():
        return {}
    try:
        return {
            (file, name): Checksums(*values)
            for file, tensors in read_json(path).items()
            for name, values in tensors.items()
        }
    except (AttributeError, TypeError):
        raise ValueError(f"{path}: damaged; it holds no checksums") from None


def _read_expert(array: StoredArray, stacked: bool, row: int, expert: int) -> np.ndarray:
    outer = (slice(row, row + 1),) if stacked else ()
    inner = map(slice, array.layout.shape[len(outer) + 1 :])
    weights, _ = array.read((*outer, slice(expert, expert + 1), *inner))
    return weights.reshape(-1).view(np.uint8)


def _read_rows(array: StoredArray, start: int, stop: int) -> np.ndarray:
    shape = array.layout.shape
    region = (slice(start, stop), *map(slice, shape[1:])) if shape else ()
    return np.ascontiguousarray(array.read(region)[0]).reshape(-1).view(np.uint8)


def _read_tensor_rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    return read_range(tensor, start * row_bytes, (stop - start) * row_bytes)
