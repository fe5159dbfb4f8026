"""Arrays on disk as Orbax reads them: a folder for each, zarr 2, one uncompressed file a chunk.

This is Orbax's layout without OCDBT. It is written here, and not through Orbax's arrays, because a
chunk is one expert, written by whichever process holds it, and read on its own: no process needs
the bank, or an array that is spread in expert order. Beside the arrays stand the chunks'
checksums, which Orbax leaves alone: zarr takes a lost chunk for zeros.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - gives numpy the names of bfloat16 and float8
import numpy as np

from jax_eplb.checkpoint.tree_names import Key, joined

MAX_CHUNK_BYTES = 2**24  # of arrays that hold no experts
_TREE = "_METADATA"
# Not "jax.Array", which Orbax restores only where it is told a sharding.
_ARRAY = "np.ndarray"
_CHECKSUMS = "checksums.*.json"


class ArrayLayout(NamedTuple):
    """An array's name, and how it is cut."""

    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def name(self) -> str:
        return joined(self.keys)

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        return tuple(-(-size // part) for size, part in zip(self.shape, self.chunks, strict=True))

    def file(self, index: Sequence[int]) -> str:
        """The file of a chunk, by its place in the grid, below the item's folder.

        >>> ArrayLayout((Key("a"), Key("b")), (4, 6), np.dtype("f4"), (1, 6)).file((3, 0))
        'a.b/3.0'
        """
        return f"{self.name}/{'.'.join(map(str, index)) or '0'}"


def cut(
    keys: tuple[Key, ...], shape: Sequence[int], dtype, local: Sequence[int] | None = None
) -> ArrayLayout:
    """The layout of an array that holds no experts: parts of at most 16 MiB along its first axis.

    `local` is the shape of one device's part, which no chunk may overstep.
    """
    shape, dtype = tuple(shape), np.dtype(dtype)
    local = shape if local is None else tuple(local)
    chunks = [max(size, 1) for size in local]
    if chunks:
        row_bytes = math.prod(chunks[1:]) * dtype.itemsize
        most = max(MAX_CHUNK_BYTES // max(row_bytes, 1), 1)
        if local[0] == shape[0]:
            chunks[0] = min(chunks[0], most)
        else:  # parts of several devices meet only at whole chunks
            chunks[0] = max(n for n in range(1, min(chunks[0], most) + 1) if chunks[0] % n == 0)
    return ArrayLayout(keys, shape, dtype, tuple(chunks))


def write_tree(
    folder: Path, layouts: Sequence[ArrayLayout], empty: Mapping[tuple[Key, ...], str] | None = None
) -> None:
    """Describe the arrays, and the nodes without any, to Orbax and zarr; one process does it."""
    kinds = {layout.keys: _ARRAY for layout in layouts} | dict(empty or {})
    for layout in layouts:
        path = folder / layout.name
        path.mkdir(parents=True, exist_ok=True)
        description = {
            "zarr_format": 2,
            "shape": layout.shape,
            "chunks": layout.chunks,
            "dtype": _dtype_name(layout.dtype),
            "compressor": None,
            "fill_value": None,
            "order": "C",
            "filters": None,
            "dimension_separator": ".",
        }
        write_file(path / ".zarray", json.dumps(description).encode())
    entries: dict[str, Any] = {}
    for keys in sorted(kinds, key=_place):  # Orbax wants a list's nodes one after the other
        entries.update(_tree_entry(keys, kinds[keys]))
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_file(folder / _TREE, json.dumps(tree).encode())


def write_chunk(folder: Path, layout: ArrayLayout, index: Sequence[int], chunk: np.ndarray) -> int:
    """Write one chunk and return its checksum. At the array's end it may be smaller."""
    if chunk.shape != layout.chunks:
        whole = np.zeros(layout.chunks, layout.dtype)
        whole[tuple(slice(size) for size in chunk.shape)] = chunk
        chunk = whole
    data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
    path = folder / layout.file(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.data)
    return zlib.crc32(data.data)


def write_checksums(folder: Path, checksums: Mapping[str, int], process: int = 0) -> None:
    """Write the checksums of the chunks that this process wrote, by file: the last that it writes.

    Where that fails, nothing of them is left.
    """
    path = _checksums_file(folder, process)
    try:
        write_file(path, json.dumps(dict(checksums)).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def has_written(folder: Path, process: int) -> bool:
    """Whether a process has written all that it had to write."""
    return _checksums_file(folder, process).exists()


def write_file(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _checksums_file(folder: Path, process: int) -> Path:
    return folder / _CHECKSUMS.replace("*", str(process))


class StoredArray:
    """An array on disk, read region by region, each whole chunk checked against its checksum."""

    def __init__(self, folder: Path, layout: ArrayLayout, checksums: Mapping[str, int]):
        self.folder, self.layout, self._checksums = folder, layout, checksums

    def read(self, region: Sequence[slice] | None = None) -> tuple[np.ndarray, int]:
        """A region, a slice of step 1 for each axis, and the bytes read for it.

        Raises ValueError that names the file of a chunk that is missing or damaged.
        """
        layout = self.layout
        ranges = [slice(0, size) for size in layout.shape] if region is None else list(region)
        bounds = [part.indices(size)[:2] for part, size in zip(ranges, layout.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], layout.dtype)
        total = 0
        if out.size == 0:
            return out, total
        touched = [
            range(start // part, -(-stop // part))
            for (start, stop), part in zip(bounds, layout.chunks, strict=True)
        ]
        first = [axis.start for axis in touched]
        for offset in np.ndindex(*map(len, touched)):
            index = [a + b for a, b in zip(first, offset, strict=True)]
            inside, outside, whole = [], [], True
            for i, part, size, (start, stop) in zip(
                index, layout.chunks, layout.shape, bounds, strict=True
            ):
                begin, end = i * part, min((i + 1) * part, size)
                low, high = max(begin, start), min(end, stop)
                inside.append(slice(low - begin, high - begin))
                outside.append(slice(low - start, high - start))
                whole &= low == begin and high == end
            if whole:
                chunk = self.read_chunk(index)
                total += chunk.nbytes
                piece = chunk[tuple(inside)]
                if piece.shape == out.shape:
                    return piece, total  # all of the region: spare the copy
                out[tuple(outside)] = piece
            else:
                piece = self._mapped(index)[tuple(inside)]
                total += piece.nbytes
                out[tuple(outside)] = piece
        return out, total

    def read_chunk(self, index: Sequence[int]) -> np.ndarray:
        """One chunk whole, checked."""
        path = self._file(index)
        data = np.fromfile(path, np.uint8)
        self._check(index, zlib.crc32(data.data))
        return data.view(self.layout.dtype).reshape(self.layout.chunks)

    def check(self) -> None:
        """Raise ValueError unless all chunks are what was written; holds 1 MiB at a time."""
        for index in np.ndindex(*self.layout.grid):
            self.check_chunk(index)

    def check_chunk(self, index: Sequence[int]) -> None:
        """Raise ValueError unless the chunk is what was written."""
        checksum = 0
        with self._file(index).open("rb") as file:
            while data := file.read(2**20):
                checksum = zlib.crc32(data, checksum)
        self._check(index, checksum)

    def checksum(self, index: Sequence[int]) -> int:
        """What was written down for this chunk. Raises ValueError where there is none."""
        try:
            return self._checksums[self.layout.file(index)]
        except KeyError:
            place = self.folder / self.layout.file(index)
            raise ValueError(f"{place}: its checksum is missing; the save was not whole") from None

    def _file(self, index: Sequence[int]) -> Path:
        path = self.folder / self.layout.file(index)
        expected = math.prod(self.layout.chunks) * self.layout.dtype.itemsize
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if size != expected:
            raise ValueError(f"{path}: holds {size} bytes, expected {expected}; it is damaged")
        return path

    def _check(self, index: Sequence[int], checksum: int) -> None:
        if checksum != self.checksum(index):
            path = self.folder / self.layout.file(index)
            raise ValueError(f"{path}: damaged; its checksum is not the one that was written")

    def _mapped(self, index: Sequence[int]) -> np.ndarray:
        return np.memmap(self._file(index), self.layout.dtype, "r", shape=self.layout.chunks)


class StoredTree(NamedTuple):
    """An item on disk: its arrays by name, and its empty nodes."""

    arrays: dict[str, StoredArray]
    empty: dict[tuple[Key, ...], str]


def open_tree(folder: Path) -> StoredTree:
    """Open an item; arrays are read on demand.

    Raises ValueError that names the file where one is missing, damaged, or another's layout.
    """
    tree = read_json(folder / _TREE)
    if not isinstance(tree, dict) or not isinstance(tree.get("tree_metadata"), dict):
        raise ValueError(f"{folder / _TREE}: holds no tree; it is damaged")
    if tree.get("use_ocdbt", True) or tree.get("use_zarr3", False):
        raise ValueError(
            f"{folder}: was written by Orbax itself, with OCDBT or zarr 3, so an expert cannot be "
            "read on its own; restore it with Orbax and save it with jax_eplb.checkpoint"
        )
    checksums: dict[str, int] = {}
    for path in sorted(folder.glob(_CHECKSUMS)):
        checksums.update(read_json(path))
    arrays, empty = {}, {}
    for entry in tree["tree_metadata"].values():
        keys = tuple(Key(key["key"], key["key_type"] == 1) for key in entry["key_metadata"])
        kind = entry["value_metadata"]["value_type"]
        if kind == _ARRAY:
            layout = _read_layout(folder, keys)
            arrays[layout.name] = StoredArray(folder, layout, checksums)
        else:
            empty[keys] = kind
    return StoredTree(arrays, empty)


def read_json(path: Path) -> Any:
    """What a file of JSON holds; ValueError that names it where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: damaged; it is not JSON") from None


def _tree_entry(keys: tuple[Key, ...], kind: str) -> dict[str, Any]:
    described = [{"key": key.text, "key_type": 1 if key.is_index else 2} for key in keys]
    value = {"value_type": kind, "skip_deserialize": kind != _ARRAY}
    name = str(tuple(key.text for key in keys))
    return {name: {"key_metadata": described, "value_metadata": value}}


def _place(keys: tuple[Key, ...]) -> list[tuple[int, str]]:
    return [(int(key.text), "") if key.is_index else (0, key.text) for key in keys]


def _read_layout(folder: Path, keys: tuple[Key, ...]) -> ArrayLayout:
    path = folder / joined(keys) / ".zarray"
    description = read_json(path)
    try:
        if description["compressor"] is not None or description["order"] != "C":
            raise ValueError
        dtype = np.dtype(description["dtype"])
        shape, chunks = tuple(description["shape"]), tuple(description["chunks"])
        if len(shape) != len(chunks) or min(chunks, default=1) < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: damaged, or not written by jax_eplb") from None
    return ArrayLayout(keys, shape, dtype, chunks)


def _dtype_name(dtype: np.dtype) -> str:
    """zarr's name: numpy's own, such as "<f4", or the plain name of an extension."""
    return dtype.str if dtype.kind != "V" and dtype.isbuiltin == 1 else dtype.name
