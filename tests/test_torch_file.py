"""Files of torch.save, written here by hand: a zip archive around a pickle, without torch."""

import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, ClassVar

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from jax_eplb.formats.torch_file import read_torch_file

_STORAGES = {
    "bool": "BoolStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
}


class Name:
    """Pickles as module.name, though nothing of that name can be imported here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *args):
        raise AssertionError("only pickled, never called")


class Storage:
    """The flat values behind tensors; `kind` is torch's storage class."""

    def __init__(self, values: np.ndarray, kind: str = "", size: int | None = None):
        self.values = values
        self.kind = Name("torch", kind or _STORAGES[values.dtype.name])
        self.size = values.size if size is None else size


class Tensor:
    def __init__(self, storage, offset, shape, strides, *, version="_v2", extra=()):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict(), *extra)
        self.rebuild = Name("torch._utils", f"_rebuild_tensor{version}")

    def __reduce__(self):
        return self.rebuild, self.arguments


class Call:
    """Pickles as the call of a name with arguments."""

    def __init__(self, module, name, *args):
        self.function, self.args = Name(module, name), args

    def __reduce__(self):
        return self.function, self.args


def tensor(array: np.ndarray) -> Tensor:
    strides = tuple(step // array.itemsize for step in array.strides)
    return Tensor(Storage(array.reshape(-1)), 0, array.shape, strides)


_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """Written in Python, so that the opcode of a name can be written for any."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages: list[Storage] = []

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        return ("storage", obj.kind, str(self.storages.index(obj)), "cuda:0", obj.size)

    def save_name(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar = {**_PythonPickler.dispatch, Name: save_name}


def entries_of(content, *, order: str = "little", root: str = "archive") -> dict[str, bytes]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    entries = {f"{root}/data.pkl": buffer.getvalue(), f"{root}/byteorder": order.encode()}
    for key, storage in enumerate(pickler.storages):
        width = storage.values.itemsize
        words = storage.values.view(f"u{width}").astype(
            f"{'<' if order == 'little' else '>'}u{width}"
        )
        entries[f"{root}/data/{key}"] = words.tobytes()
    entries[f"{root}/version"] = b"3\n"
    return entries


def write_entries(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def write_pt(path, content, **options):
    return write_entries(path, entries_of(content, **options))


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("dtype", sorted(_STORAGES))
def test_each_dtype_is_read_in_both_byte_orders(tmp_path, dtype, order):
    values = np.array([[0, 1, 2], [3, 100, 1]]).astype(jnp.dtype(dtype))
    read = read_torch_file(write_pt(tmp_path / "a.pt", {"x": tensor(values)}, order=order))["x"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


@st.composite
def views(draw):
    """A base array and a view of it, as transposing and slicing make them."""
    base = draw(arrays(np.int32, array_shapes(max_dims=3, max_side=5)))
    index = tuple(
        slice(draw(st.integers(0, size - 1)), size, draw(st.integers(1, 3))) for size in base.shape
    )
    return base, base[index].transpose(draw(st.permutations(range(base.ndim))))


@given(views())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_strides_and_offset_are_honoured(tmp_path_factory, case):
    base, view = case
    start = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    strides = tuple(step // 4 for step in view.strides)
    saved = Tensor(Storage(base.reshape(-1)), start // 4, view.shape, strides)
    path = tmp_path_factory.mktemp("pt") / "a.pt"
    np.testing.assert_array_equal(read_torch_file(write_pt(path, saved)), view)


def test_tensors_share_a_storage(tmp_path):
    storage = Storage(np.arange(6))
    content = [Tensor(storage, 0, (6,), (1,)), Tensor(storage, 4, (2,), (1,))]
    first, second = read_torch_file(write_pt(tmp_path / "a.pt", content))
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert second.tolist() == [4, 5]


def test_expanded_empty_and_scalar_tensors_are_read(tmp_path):
    content = (
        Tensor(Storage(np.arange(3)), 0, (2, 3), (0, 1)),
        Tensor(Storage(np.arange(0)), 0, (0, 3), (3, 1)),
        Tensor(Storage(np.array([7])), 0, (), ()),
    )
    expanded, empty, scalar = read_torch_file(write_pt(tmp_path / "a.pt", content))
    assert expanded.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert empty.shape == (0, 3)
    assert scalar.shape == ()
    assert scalar == 7


def test_a_tensor_of_untyped_storage_says_its_dtype(tmp_path):
    values = np.array([1, 65535], np.uint16)
    storage = Storage(values, "UntypedStorage", size=4)
    saved = Tensor(storage, 0, (2,), (1,), version="_v3", extra=(Name("torch", "uint16"),))
    read = read_torch_file(write_pt(tmp_path / "a.pt", saved))
    assert read.dtype == np.uint16
    assert read.tolist() == [1, 65535]


def test_plain_values_are_kept(tmp_path):
    content = {
        "rank": 0,
        "rate": None,
        "size": Call("torch", "Size", (2, 3)),
        "name": "a",
        "f": 0.5,
    }
    content["device"] = Call("torch", "device", "cuda")
    read = read_torch_file(write_pt(tmp_path / "a.pt", content))
    assert read == {**content, "size": (2, 3), "device": "cuda"}


def test_an_archive_without_byte_order_is_little_endian(tmp_path):
    entries = entries_of(tensor(np.array([1, 2], np.int32)))
    del entries["archive/byteorder"]
    assert read_torch_file(write_entries(tmp_path / "a.pt", entries)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (os.name, "system"),
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("functools", "partial"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_any_other_name_is_refused(tmp_path, module, name):
    mark = tmp_path / "executed"
    path = write_pt(tmp_path / "a.pt", {"x": Call(module, name, f"touch {mark}")})
    with pytest.raises(ValueError, match=rf"a\.pt: refused to load {module}\.{name}; only"):
        read_torch_file(path)
    assert not mark.exists()


@pytest.mark.parametrize("attribute", [b"__call__", b"path", b"other"])
def test_a_pickle_cannot_change_what_reads_it(tmp_path, attribute):
    # PROTO 2, the rebuilding function, state (None, {attribute: 1}), BUILD, STOP.
    name = len(attribute).to_bytes(4, "little") + attribute
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X" + name + b"K\x01s\x86b."
    path = write_entries(tmp_path / "a.pt", {"archive/data.pkl": evil})
    with pytest.raises(ValueError, match=r"a\.pt: damaged pickle \(AttributeError"):
        read_torch_file(path)


def test_storages_and_dtypes_cannot_be_called(tmp_path):
    path = write_pt(tmp_path / "a.pt", Call("torch", "FloatStorage", 3))
    with pytest.raises(ValueError, match=r"a\.pt: damaged pickle \(TypeError"):
        read_torch_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pt: no such file"):
        read_torch_file(tmp_path / "a.pt")


def test_a_legacy_file_tells_how_to_save_again(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, 2))
    with pytest.raises(
        ValueError, match=r"before PyTorch 1\.6.*again with torch\.save\(torch\.load"
    ):
        read_torch_file(path)


def test_another_kind_of_file_is_named(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.pt: not a file of torch\.save"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive/data.pkl": None}, "0 entries NAME/data.pkl"),
        ({"other/data.pkl": b""}, "2 entries NAME/data.pkl"),
        ({"archive/byteorder": b"middle"}, "byte order 'middle' is neither"),
        ({"archive/data/0": None}, "entry archive/data/0 is missing"),
        ({"archive/data/0": b"12345"}, "storage 0 has 5 bytes, expected 24"),
        ({"archive/data.pkl": b""}, r"damaged pickle \(EOFError"),
        ({"archive/data.pkl": b"\x80\x02J"}, "damaged pickle"),
    ],
)
def test_each_fault_of_the_archive_has_its_message(tmp_path, change, message):
    entries = {**entries_of(tensor(np.arange(3))), **change}
    present = {name: data for name, data in entries.items() if data is not None}
    path = write_entries(tmp_path / "a.pt", present)
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (4,), (1,), "reach element 3, but the storage has 3"),
        (3, (1,), (1,), "reach element 3"),
        (0, (2,), (-1,), "are no tensor's"),
        (0, (2, 1), (1,), "are no tensor's"),
        (-1, (2,), (1,), "are no tensor's"),
        (0, (1.0,), (1,), "are no tensor's"),
        (0, (2**20, 2**20), (0, 0), "too large"),
        (0, 5, (1,), "damaged pickle"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, strides, message):
    path = write_pt(tmp_path / "a.pt", Tensor(Storage(np.arange(3)), offset, shape, strides))
    with pytest.raises(ValueError, match=message):
        read_torch_file(path)


def test_a_tensor_without_storage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a tensor without a storage"):
        read_torch_file(write_pt(tmp_path / "a.pt", Tensor("file", 0, (1,), (1,))))


def test_a_compressed_entry_is_refused(tmp_path):
    entries = entries_of(tensor(np.zeros(1000, np.int64)))
    path = write_entries(tmp_path / "a.pt", entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which"):
        read_torch_file(path)


def _sample(path) -> bytes:
    content = {"logical_count": tensor(np.arange(24).reshape(2, 3, 4)), "rank": 0}
    return write_pt(path, content).read_bytes()


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    whole = _sample(path)
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.pt: "):
            read_torch_file(path)


_CHANGES = st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=3)


def _changed(data: bytes, changes) -> bytes:
    damaged = bytearray(data)
    for place, byte in changes:
        damaged[place % len(data)] = byte
    return bytes(damaged)


@given(_CHANGES, st.booleans())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_damaged_bytes_are_refused_or_read_never_worse(tmp_path_factory, changes, in_pickle):
    path = tmp_path_factory.mktemp("pt") / "a.pt"
    data = _sample(path)
    if in_pickle:  # under a right checksum
        entries = entries_of({"logical_count": tensor(np.arange(24)), "rank": 0})
        entries["archive/data.pkl"] = _changed(entries["archive/data.pkl"], changes)
        write_entries(path, entries)
    else:
        path.write_bytes(_changed(data, changes))
    with contextlib.suppress(ValueError):  # any other error would be a fault of the reader
        read_torch_file(path)
