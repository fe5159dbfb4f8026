"""Read the files that `torch.save` writes, without torch, into numpy arrays.

Since PyTorch 1.6 such a file is a zip archive: NAME/data.pkl, a pickle of the saved object in which
a tensor names its storage, shape and strides; NAME/data/KEY, the raw bytes of each storage; and
NAME/byteorder. See "Serialization semantics" in PyTorch's documentation. Only tensors of plain
numbers inside dicts, lists and tuples are read; all other names are refused.
"""

import io
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_eplb.formats.files import DAMAGE, brief, check_file, naming
from jax_eplb.formats.safe_pickle import PickleError, load_pickle

_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # its magic number

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name)
    for bits in (8, 16, 32, 64)
    for name in (f"int{bits}", f"uint{bits}", f"float{bits}")
    if name != "float8"
}
_DTYPES["bool"] = np.dtype(np.bool_)
_DTYPES["bfloat16"] = np.dtype(jnp.bfloat16)

_STORAGES = {
    "BoolStorage": "bool",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "UntypedStorage": "",  # the tensor says what its bytes are
}

# An expanded tensor, of stride 0, is larger than its storage; past this many elements the
# likelier reason is a damaged shape.
_MAX_EXPANDED = 2**28


class _Named(NamedTuple):
    """Stands for a torch class; cannot be called."""

    kind: str
    dtype: str


class _Storage(NamedTuple):
    key: str
    dtype: str  # "" for raw bytes
    data: bytes


class _Rebuild(NamedTuple):
    """`torch._utils._rebuild_tensor_v2` and `_v3`: a strided view of a storage."""

    path: Path
    swap: bool  # the archive's byte order is not this machine's

    def __call__(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        _requires_grad: Any = None,
        _hooks: Any = None,
        *rest: Any,
    ) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise PickleError(f"{self.path}: a tensor without a storage")
        dtype = storage.dtype
        if not dtype:  # _v3 passes the dtype
            dtype = rest[0].dtype if rest and isinstance(rest[0], _Named) else "uint8"
        place = f"{self.path}: tensor in storage {storage.key}"
        flat = _numbers(storage.data, _DTYPES[dtype], self.swap, place)
        return _strided(flat, offset, shape, strides, place)


class _Plain:
    """A torch value type that is read as its argument: `torch.Size`, `torch.device`."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


def _numbers(data: bytes, dtype: np.dtype, swap: bool, place: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise PickleError(
            f"{place}: {len(data)} bytes are no whole number of {dtype}; the file is damaged"
        )
    # Through unsigned integers, because bfloat16 has no byte order of its own in numpy.
    words = np.frombuffer(data, f"u{dtype.itemsize}")
    return (words.byteswap() if swap else words).view(dtype)


def _strided(flat: np.ndarray, offset: Any, shape: Any, strides: Any, place: str) -> np.ndarray:
    """The view of `flat` with this offset, shape and strides, in elements; read-only."""
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
        raise PickleError(
            f"{place}: offset {brief(offset)}, shape {brief(shape)} and strides {brief(strides)} "
            "are no tensor's"
        )
    elements = int(np.prod(shape, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if elements and last >= flat.size:
        raise PickleError(
            f"{place}: shape {tuple(shape)} and strides {tuple(strides)} from {offset} reach "
            f"element {last}, but the storage has {flat.size}; the file is damaged"
        )
    if elements > max(flat.size, _MAX_EXPANDED):
        raise PickleError(f"{place}: shape {tuple(shape)} is too large for an expanded tensor")
    if not elements:
        return np.zeros(tuple(shape), flat.dtype)
    steps = tuple(step * flat.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(flat[offset:], tuple(shape), steps, writeable=False)


def read_torch_file(path: str | os.PathLike) -> Any:
    """The object in a file of `torch.save`, with numpy arrays (read-only) in place of tensors.

    bfloat16 tensors become arrays of `ml_dtypes.bfloat16`; where a tensor lived is forgotten.
    Raises ValueError naming the file and the fault: not such a file, the format of before
    PyTorch 1.6, a damaged archive, pickle or storage, or a name that is not read.
    """
    path = check_file(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if not zipfile.is_zipfile(path):
        if start == _LEGACY_START:
            raise ValueError(
                f"{path}: written in the format of before PyTorch 1.6, which is not read; save it "
                "again with torch.save(torch.load(PATH, weights_only=True), PATH)"
            )
        raise ValueError(f"{path}: not a file of torch.save, or a truncated one")
    with (
        naming(path, "damaged zip archive", *_ARCHIVE_DAMAGE),
        zipfile.ZipFile(path) as archive,
    ):
        return _read_archive(archive, path)


# A PickleError is a ValueError with its message complete; so ValueError itself is not among these.
_ARCHIVE_DAMAGE = (*(error for error in DAMAGE if error is not ValueError), UnicodeError)


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    stored = [e.file_size for e in archive.infolist() if e.compress_type == zipfile.ZIP_STORED]
    if sum(stored) > path.stat().st_size:
        raise ValueError(f"{path}: its entries overlap, as those of torch.save do not")
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(
            f"{path}: a zip archive with {len(pickles)} entries NAME/data.pkl, where a file of "
            "torch.save has one"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = "little"
    if f"{root}byteorder" in archive.namelist():
        order = _read_entry(archive, f"{root}byteorder", path).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise ValueError(f"{path}: byte order {order!r} is neither 'little' nor 'big'")
    read: dict[tuple[str, str], _Storage] = {}

    def load_storage(pid: Any) -> _Storage:
        match pid:
            case ("storage", _Named("storage", dtype), str() as key, _, int() as size, *_):
                pass
            case _:
                raise PickleError(f"{path}: unreadable storage {brief(pid)}")
        if (key, dtype) not in read:
            data = _read_entry(archive, f"{root}data/{key}", path)
            width = _DTYPES[dtype].itemsize if dtype else 1
            if len(data) != size * width:
                raise PickleError(
                    f"{path}: storage {key} has {len(data)} bytes, expected {size * width}; "
                    "the file is damaged"
                )
            read[key, dtype] = _Storage(key, dtype, data)
        return read[key, dtype]

    swap = order != ("little" if np.little_endian else "big")
    names = _torch_names(_Rebuild(path, swap))
    return load_pickle(
        io.BytesIO(_read_entry(archive, pickles[0], path)), path, names, load_storage
    )


def _torch_names(rebuild: _Rebuild) -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch._utils", "_rebuild_tensor_v3"): rebuild,
        ("torch", "Size"): _Plain(),
        ("torch", "device"): _Plain(),
    }
    names.update({("torch", name): _Named("dtype", name) for name in _DTYPES})
    for name, dtype in _STORAGES.items():
        names["torch", name] = names["torch.storage", name] = _Named("storage", dtype)
    return names


def _read_entry(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """The bytes of one entry. Entries are stored as they are, so none exceeds the file's size."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise PickleError(f"{path}: the entry {name} is missing; the file is damaged") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise PickleError(f"{path}: the entry {name} is compressed, which torch.save does not do")
    try:
        return archive.read(entry)
    except DAMAGE as error:
        raise PickleError(f"{path}: the entry {name} is damaged ({error})") from error
