"""Damaged and hostile files: each reader gives a recording or a plan, or a ValueError that names
the file; never another error, and never much more memory than the file has bytes."""

import contextlib
import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save

from jax_eplb import formats
from jax_eplb.formats import load_placement, load_recording, save_placement, save_recording
from jax_eplb.formats.balancedness_log import load_balancedness
from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from tests.engine_readers import FORMS

# numpy takes a damaged header for one that Python 2 wrote, and tries that.
pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")
_MEMORY = 64 << 20  # bytes; what reading a small file may take, a hostile one included


def _placement() -> Placement:
    return Placement.default(num_experts=3, num_slots=4, num_ranks=2, layer_ids=(1, 2))


def _recording() -> Recording:
    return Recording(np.arange(12).reshape(2, 2, 3), 3, 1, layer_ids=(1, 2))


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, bytes]:
    """A valid file of each format, by a name with its suffix."""
    folder = tmp_path_factory.mktemp("valid")
    for engine, suffix in FORMS:
        save_placement(_placement(), folder / f"{engine}{suffix}", engine=engine)
    for name in ("native.npz", "native.safetensors", "counts.npy"):
        save_recording(_recording(), folder / name)
    for name in ("counts.pt", "counts.json"):
        formats.sglang.save_recording(_recording(), folder / name)
    np.save(folder / "pickled.npy", np.array({"logical_count": np.arange(6).reshape(2, 3)}, object))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_every_way(path) -> None:
    """All that may be done with a path; ValueErrors name it, nothing else is raised."""
    for read in (
        lambda: load_placement(path, num_ranks=2, unsafe_pickle=True),
        lambda: load_placement(path, num_ranks=2, layer_ids=[1, 2], unsafe_pickle=True),
        lambda: load_recording(path, unsafe_pickle=True),
        lambda: formats.holds_plan(path, unsafe_pickle=True),
        lambda: formats.load_layer_updates(path),
        lambda: load_balancedness(path),
    ):
        message = str(path)
        try:
            read()
        except ValueError as error:
            message = str(error)
        assert str(path) in message
        assert len(message) < 5000


_CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=120)
def test_changed_bytes(valid, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(valid)))
    content = bytearray(valid[name])
    for place, byte in data.draw(_CHANGES):
        content[place % len(content)] = byte
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    read_every_way(path)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_cut_and_joined_files(valid, tmp_path_factory, data):
    names = st.sampled_from(sorted(valid))
    first, second = data.draw(names), data.draw(names)
    cut = data.draw(st.integers(0, len(valid[first])))
    content = valid[first][:cut]
    if data.draw(st.booleans()):
        content += valid[second][data.draw(st.integers(0, len(valid[second]))) :]
    path = tmp_path_factory.mktemp("cut") / first
    path.write_bytes(content)
    read_every_way(path)


_KEYS = st.sampled_from(
    [
        *("physical_to_logical_map", "logical_count", "num_logical_experts", "num_moe_layers"),
        *("num_slots", "initial_global_assignments", "layer_updates_per_iter", "3"),
        *("moe_layer_count", "layer_list", "layer_id"),
        *("device_list", "device_count", "device_id", "device_expert"),
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@given(content=_JSON)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_wrong_types_under_the_right_keys(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("types") / "a.json"
    path.write_text(json.dumps(content))
    read_every_way(path)


def npy(shape, *, dtype="<i8", data=b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    # The least compression takes a third of the time of the usual one, and bombs are bombs.
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def overlapping(count: int) -> bytes:
    """An archive whose entries are all the same bytes, so that it unpacks to many times itself."""
    whole = archive({"a.npy": npy((1 << 17,), data=bytes(1 << 20))})
    end = whole.rindex(b"PK\x05\x06")
    start = whole.index(b"PK\x01\x02")
    directory = whole[start:end] * count
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    return whole[:start] + directory + tail


def pickled(payload: bytes) -> bytes:
    """An array of one object, and the pickle behind it."""
    return npy((), dtype="|O", data=payload)


def torch_archive(payload: bytes, **storages: bytes) -> bytes:
    names = {f"a/data/{key}": data for key, data in storages.items()}
    return archive({"a/data.pkl": payload, **names}, zipfile.ZIP_STORED)


def laughs(depth: int) -> bytes:
    """YAML of a few bytes, which stands for 9**depth scalars."""
    lines = ["a0: &a0 [0,0,0,0,0,0,0,0,0]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"num_slots: *a{depth - 1}"]).encode()


def merges(depth: int) -> bytes:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, depth)]
    return "\n".join([*lines, "num_slots: 4"]).encode()


def shared(before: bytes, after: bytes) -> bytes:
    """A pickle with a tuple of itself twice, 60 deep: written out, 2**60 numbers."""
    return before + b"(K\0t" + b"".join(b"q%c0(h%ch%ct" % (i, i, i) for i in range(60)) + after


HOSTILE = {
    "huge_array.npy": npy((1 << 40,), data=bytes(64)),
    "many_axes.npy": npy("(" + "1," * 70 + ")", data=bytes(8)),
    "wide_dtype.npy": npy((1,), dtype="|V2000000000"),
    "negative.npy": npy((-1, 4), data=bytes(64)),
    # Python 3.13's tokenizer, which numpy tries on it, fails with a SystemError.
    "zeros_in_header.npy": b"\x93NUMPY\x01\x00=\x00 }\n"
    + bytes(32)
    + b"{'descre': (-1, 4), }\n"
    + bytes(64),
    "name.pt": archive({"a/data.pkl": b""}, zipfile.ZIP_STORED).replace(
        b"\x00\x00a/data.pklPK\x05", b"\x00\x00a/data\x80pklPK\x05"
    ),
    "long_header.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{",
    "huge_entry.npz": archive({"counts.npy": npy((1 << 40,))}),
    "bomb.npz": archive({"counts.npy": npy((1, 1, 1 << 24), data=bytes(1 << 27))}),
    "overlapping.npz": overlapping(500),
    "huge_header.safetensors": struct.pack("<Q", 1 << 62) + b"{" + b" " * 64,
    "deep_header.safetensors": struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    "huge_tensor.safetensors": save({"a": np.zeros(4)}).replace(b"[4]", b"[9]"),
    "deep_metadata.safetensors": save(
        {"counts": np.ones((1, 1, 1), int)}, {"jax_eplb": "[" * 100_000}
    ),
    "memo.npy": pickled(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "memo_text.npy": pickled(b"Np2147483647\n."),
    "long_bytes.npy": pickled(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x."),
    "long_text.npy": pickled(b"\x80\x04\x8d" + (1 << 33).to_bytes(8, "little") + b"x."),
    "long_array.npy": pickled(b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x."),
    "frame.npy": pickled(b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"x."),
    "deep.npy": pickled(b"(" * 5_000 + b"t" * 5_000 + b"."),
    "shared.npy": pickled(shared(b"cnumpy\ndtype\n(", b"tR.")),
    "key.npy": pickled(shared(b"}(", b"K\1u.")),
    "key.pt": torch_archive(shared(b"\x80\x02}(", b"K\1u.")),
    "shared.pt": torch_archive(shared(b"\x80\x02(X\x07\0\0\0storage", b"tQ.")),
    "call.npy": pickled(b"cos\nsystem\n(X\x04\0\0\0truetR."),
    "built.npy": pickled(pickle.dumps(np.dtype("i8"))),
    "memo.pt": torch_archive(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "call.pt": torch_archive(b"\x80\x02cposix\nsystem\n(X\x04\0\0\0truetR."),
    "no_storage.pt": torch_archive(b"\x80\x02(X\x07\0\0\0storagetQ."),
    "deep.json": b"[" * 1_000_000,
    "deep_object.json": b'{"layer_list":' * 50_000,
    "digits.json": b'{"num_slots": ' + b"9" * 100_000 + b"}",
    "bytes.json": b"[[0, \xff\xff]]",
    "deep.yaml": b"num_slots: " + b"[" * 100_000,
    "laughs.yaml": laughs(60),
    "merges.yaml": merges(60),
    "sixties.yaml": b"num_slots: 1" + b":1" * 100_000,
    "tagged.yaml": b"num_slots: !!python/object/apply:os.system ['true']",
    "empty_int.yaml": b"num_slots: !!int ''",
    "no_time.yaml": b"num_slots: !!timestamp x",
    "no_bool.yaml": b"num_slots: !!bool x",
    "many_slots.yaml": b"num_slots: 1000000000000",
    "large.yaml": b"num_slots: 4\n" + b"#" * (5 << 20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_little_memory_and_run_nothing(tmp_path, monkeypatch, name):
    calls = []
    monkeypatch.setattr("os.system", calls.append)
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        read_every_way(path)
        with contextlib.suppress(ValueError):
            load_placement(path, num_ranks=2, num_experts=3, layer_ids=[1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not calls
    assert peak < _MEMORY + 8 * len(HOSTILE[name])


def test_json_larger_than_any_plan_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_eplb.formats.files._MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text("[[0, 1, 2, 3]]")
    with pytest.raises(ValueError, match=r"a\.json: larger than 10 bytes"):
        load_placement(tmp_path / "a.json", num_ranks=2)
