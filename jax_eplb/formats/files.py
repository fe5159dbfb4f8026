"""Reading and writing of files: faults are named, and a file is written whole or not at all."""

import contextlib
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.npyio import NpzFile

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


def read_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, which must not hold pickled objects.

    The file is mapped, so that a damaged header cannot claim more memory than the file has.
    """
    with naming(path, "damaged .npy file", *DAMAGE):
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, which must not hold pickled objects."""
    arrays = {}
    with path.open("rb") as file:
        with naming(path, "not an .npz archive, or a truncated one", *DAMAGE):
            archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError(f"{path}: not an .npz archive; its content is a single array")
        with archive:
            for name in archive.files:
                with naming(path, f"array {name!r} is damaged", *DAMAGE):
                    arrays[name] = np.asarray(archive[name])
    return arrays


@contextlib.contextmanager
def prefixing(place: str | Path) -> Iterator[None]:
    """Put the place before the message of a ValueError that is complete but for that."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
