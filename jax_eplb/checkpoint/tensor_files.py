"""Safetensors files of any size: headers, reads of a range, and writing piece by piece.

A file is eight bytes, the header's length; the header, JSON; and the tensors' bytes. The library's
own writer wants all of it in memory.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_eplb.checkpoint.array_files import read_json

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, as safetensors itself allows
DTYPES = {
    "BOOL": np.dtype(np.bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checksums(NamedTuple):
    """CRC-32 of a tensor's pieces: its experts, or equal parts of it."""

    piece_bytes: int
    crc32: list[int]


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, in the order of their bytes, and its metadata.

    Raises ValueError that names the file where it is missing, cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no mapping")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        try:
            code, (begin, end) = entry["dtype"], entry["data_offsets"]
            shape = tuple(entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: the entry of {name!r} is damaged") from None
        if code not in DTYPES:
            raise ValueError(f"{path}: {name!r} is of type {code}; known: {', '.join(DTYPES)}")
        tensor = Tensor(path, DTYPES[code], shape, 8 + length + begin)
        if tensor.nbytes != end - begin or 8 + length + end > size:
            raise ValueError(f"{path}: {name!r} reaches past the end of the file; it is cut short")
        tensors[name] = tensor
    return dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, or of a directory of files, with or without an index of them.

    Raises ValueError that names the file, and the tensor that the index has and the file has not.
    """
    if path.is_file():
        return read_header(path)
    index = path / INDEX
    files = sorted(path.glob("*.safetensors"))
    weight_map = None
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: holds no weight_map; it is damaged")
        files = sorted({path / name for name in weight_map.values()})
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, notes = read_header(file)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise ValueError(f"{file}: {twice!r} is in {tensors[twice].file.name}, too")
        tensors |= found
        metadata |= notes
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != path / file:
            raise ValueError(f"{path / file}: lacks {name!r}, which {index.name} says is there")
    return tensors, metadata


def read_range(tensor: Tensor, start: int, size: int) -> np.ndarray:
    """uint8[size]: a part of a tensor's bytes. Raises ValueError where the file has not as many."""
    with tensor.file.open("rb") as file:
        data = np.fromfile(file, np.uint8, size, offset=tensor.start + start)
    if data.size != size:
        raise ValueError(f"{tensor.file}: cut short while it was read")
    return data


def check_pieces(name: str, tensor: Tensor, expected: Checksums) -> None:
    """Read a tensor and compare it with its checksums; ValueError where it differs."""
    for piece in range(len(expected.crc32)):
        start = piece * expected.piece_bytes
        size = min(expected.piece_bytes, tensor.nbytes - start)
        check_piece(name, tensor, expected, piece, read_range(tensor, start, size))


def check_piece(
    name: str, tensor: Tensor, expected: Checksums, piece: int, data: np.ndarray
) -> None:
    """Compare one piece that was read with its checksum; ValueError where it differs."""
    if zlib.crc32(data.data) != expected.crc32[piece]:
        raise ValueError(
            f"{tensor.file}: piece {piece} of {name!r} is damaged; its checksum is not the one "
            "that was written"
        )


class TensorWriter:
    """Writes a file whose tensors are known beforehand, in pieces and in any order."""

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._start: dict[str, int] = {}
        end = 0
        for spec in specs:
            self._start[spec.name] = end
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        self._begin = 8 + len(text)
        self.path = path
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._begin + end)

    def write(self, name: str, data: np.ndarray, offset: int = 0) -> None:
        """Write bytes of one tensor, `offset` bytes from its beginning."""
        self._file.seek(self._begin + self._start[name] + offset)
        self._file.write(data.data)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write which file each tensor is in, as Hugging Face's readers want it."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(content, indent=2))
