"""Reading and writing of files: faults are named, and a file is written whole or not at all."""

import contextlib
import io
import json
import math
import os
import reprlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

NPY_MAGIC = b"\x93NUMPY"

# What numpy and zipfile raise on damaged input. MemoryError: a header may claim any shape.
# RuntimeError, NotImplementedError: encrypted entries and unknown compressions of zip archives.
DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)

# A list of lists takes some 25 bytes of memory for each byte of JSON.
_MAX_JSON_BYTES = 64 << 20
# What a compressed archive may unpack to: this much, or this many times its own size.
_MAX_UNPACKED_BYTES = 64 << 20
_MAX_UNPACKED_RATIO = 100
_MAX_NPY_HEADER = 1 << 16


_repr = reprlib.Repr()
_repr.maxlevel = 2


def brief(value: Any) -> str:
    """A value of a file for a message: at most 100 characters, however much the file nests."""
    text = _repr.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextlib.contextmanager
def naming(place: str | Path, fault: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the given errors into a ValueError that names the place and the fault."""
    try:
        yield
    except errors as error:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"{place}: {fault} ({detail})") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write a file beside `path`, and put it in its place only once it is complete."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_file(path: str | os.PathLike) -> Path:
    """The path of a file that exists; otherwise ValueError."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; give a file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return path


def check_suffix(path: str | os.PathLike, suffixes: tuple[str, ...], reader: str) -> str:
    """The path's suffix, by which the engine itself tells the format; ValueError for others."""
    suffix = Path(path).suffix
    if suffix not in suffixes:
        raise ValueError(
            f"{path}: {reader} must be written to a file named {' or '.join(suffixes)}, by which "
            "its format is told"
        )
    return suffix


def read_limited(path: Path, limit: int) -> bytes:
    """The whole file, of at most `limit` bytes; ValueError where it is larger."""
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: larger than {limit} bytes, which no file of this kind is")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError where it cannot be parsed or a key stands twice."""
    content = read_limited(path, _MAX_JSON_BYTES)
    with naming(path, "unparsable JSON", ValueError, RecursionError, MemoryError):
        return json.loads(content, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise ValueError(f"key {brief(twice)} stands twice")
    return value


def read_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, which must not hold pickled objects.

    The file is mapped, so that a damaged header cannot claim more memory than the file has.
    """
    with naming(path, "damaged .npy file", *DAMAGE):
        with path.open("rb") as file:
            read_npy_header(file)
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, which must not hold pickled objects.

    What the archive unpacks to is checked before anything is: a few bytes may claim any size.
    """
    arrays = {}
    with path.open("rb") as file:
        if file.read(len(NPY_MAGIC)) == NPY_MAGIC:
            raise ValueError(f"{path}: not an .npz archive; its content is a single array")
        with naming(path, "not an .npz archive, or a truncated one", *DAMAGE):
            archive = zipfile.ZipFile(file)
        with archive:
            _check_unpacked(path, archive)
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                with naming(path, f"array {name!r} is damaged", *DAMAGE):
                    arrays[name] = _read_entry(archive, entry)
    return arrays


def _check_unpacked(path: Path, archive: zipfile.ZipFile) -> None:
    size = path.stat().st_size
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * size):
        raise ValueError(
            f"{path}: {size} bytes unpack to {unpacked}, more than {_MAX_UNPACKED_RATIO} times as "
            "many; if that is right, save the arrays uncompressed"
        )


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array, once its header claims no more than its entry has."""
    with archive.open(entry) as file:
        shape, dtype = read_npy_header(file)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"shape {shape} of {dtype} is more than the entry has")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype at the start of a `.npy` file, leaving it before the data.

    The length of the header is looked at before that much memory is taken.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    length = file.read(2)
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
        length += file.read(2)
    count = int.from_bytes(length, "little")
    if count > _MAX_NPY_HEADER:
        raise ValueError(f"a header of {count} bytes")
    header = file.read(count)
    if b"\0" in header:  # on which Python's own tokenizer fails
        raise ValueError("a header that is no text")
    shape, _, dtype = read(io.BytesIO(length + header))
    return shape, dtype


@contextlib.contextmanager
def prefixing(place: str | Path) -> Iterator[None]:
    """Put the place before the message of a ValueError that is complete but for that."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
