"""Write arrays as `torch.save` writes a dict of tensors, without torch.

The counterpart of `torch_file`: `archive/data.pkl`, a pickle of protocol 2 that names the storage,
shape and strides of each tensor, and the storages' bytes beside it. It uses the opcodes and names
that `torch.load(..., weights_only=True)` allows, and no others.
"""

import pickle
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same bytes


def write_torch_file(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dict of int64 tensors; arrays of other integers become int64."""
    storages = [np.ascontiguousarray(array, "<i8") for array in tensors.values()]
    pickled = [b"\x80\x02}("]  # protocol 2, an empty dict, a mark
    for key, (name, array) in enumerate(zip(tensors, storages, strict=True)):
        pickled += [_text(name), _tensor(str(key), array)]
    pickled.append(b"u.")  # set the items since the mark, stop
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", b"".join(pickled))
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(storages):
            _add(archive, f"data/{key}", array.tobytes())
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), data)


def _tensor(key: str, array: np.ndarray) -> bytes:
    """The call of `_rebuild_tensor_v2` with a storage, and the tensor's place in it."""
    storage = [_text("storage"), b"ctorch\nLongStorage\n", _text(key), _text("cpu")]
    parts = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"((",
        *storage,
        _integer(array.size),
        b"tQ",  # that tuple as a persistent id
        _integer(0),
        _shape(array.shape),
        _shape(tuple(step // array.itemsize for step in array.strides)),
        b"\x89",  # needs no gradient
        b"ccollections\nOrderedDict\n)R",  # no hooks
        b"tR",
    ]
    return b"".join(parts)


def _shape(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def _integer(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]  # without protocol and stop


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data
