import json
import re
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_eplb.checkpoint.tensor_files import (
    DTYPES,
    INDEX,
    Checksums,
    TensorSpec,
    TensorWriter,
    check_pieces,
    open_tensors,
    read_header,
    read_range,
)
from tests.hugging_face_cases import arrays_of, as_bytes, mixtral, write

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(np.uint8),
    "none": np.zeros((0, 3), np.int64),
    "number": np.array(2.5, np.float16),
}


def test_what_the_library_wrote_is_found(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"x": "y"})
    tensors, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"x": "y"}
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        found = read_range(tensors[name], 0, array.nbytes)
        np.testing.assert_array_equal(found, as_bytes(array))
    np.testing.assert_array_equal(read_range(tensors["a"], 8, 4).view(np.float32), [2])


def test_the_library_reads_what_is_written_in_pieces_and_in_any_order(tmp_path):
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in ARRAYS.items()]
    with TensorWriter(tmp_path / "a.safetensors", specs, {"x": "y"}) as writer:
        writer.write("number", as_bytes(ARRAYS["number"]))
        writer.write("b", as_bytes(ARRAYS["b"]))
        writer.write("a", as_bytes(ARRAYS["a"][1]), 12)
        writer.write("a", as_bytes(ARRAYS["a"][0]))
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"x": "y"}


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_has_the_librarys_name(tmp_path, code):
    with TensorWriter(tmp_path / "a.safetensors", [TensorSpec("a", DTYPES[code], (2,))]) as writer:
        writer.write("a", np.arange(2 * DTYPES[code].itemsize, dtype=np.uint8))
    ((_, entry),) = safetensors.deserialize((tmp_path / "a.safetensors").read_bytes())
    assert entry["dtype"] == code
    assert list(entry["data"]) == list(range(2 * DTYPES[code].itemsize))
    assert read_header(tmp_path / "a.safetensors")[0]["a"].dtype == DTYPES[code]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_folder_of_files_is_one_checkpoint(tmp_path, with_index):
    folder = write(mixtral, tmp_path / "model", files=3)
    if not with_index:
        (folder / INDEX).unlink()
    tensors, metadata = open_tensors(folder)
    assert tensors.keys() == arrays_of(mixtral).keys()
    assert metadata == {"format": "pt"}


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    whole = path.read_bytes()
    tensors, _ = read_header(path)
    for kept, message in (
        (-1, "reaches past the end"),
        (20, "not a safetensors"),
        (0, "not a safe"),
    ):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
            read_header(path)
    with pytest.raises(ValueError, match="cut short while it was read"):
        read_range(tensors["a"], 0, 24)


def changed_header(path, change):
    safetensors.numpy.save_file(ARRAYS, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["a"].pop("shape"), "the entry of 'a' is damaged"),
        (lambda header: header["a"].update(dtype="F4"), "'a' is of type F4; known: BOOL, U8"),
        (lambda header: header["a"].update(shape=[2, 4]), "'a' reaches past the end"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    changed_header(path, change)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_header(path)


def test_a_tensor_that_the_index_has_and_the_file_has_not_is_named(tmp_path):
    folder = write(mixtral, tmp_path / "model")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(content))
    message = f"{folder / 'model-00002-of-00002.safetensors'}: lacks 'lm_head.weight'"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_tensors(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    folder = write(mixtral, tmp_path / "model")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{folder / INDEX}: ")):
        open_tensors(folder)


def test_a_missing_file_is_named(tmp_path):
    folder = write(mixtral, tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: cannot be read"):
        open_tensors(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file(ARRAYS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: '\w+' is in a.safetensors, too"):
        open_tensors(tmp_path)


def test_a_piece_that_was_changed_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    array = np.arange(12).astype(ml_dtypes.bfloat16).reshape(3, 4)
    with TensorWriter(path, [TensorSpec("a", array.dtype, array.shape)]) as writer:
        writer.write("a", as_bytes(array))

    pieces = Checksums(8, [zlib.crc32(as_bytes(row).data) for row in array])
    tensor = read_header(path)[0]["a"]
    check_pieces("a", tensor, pieces)
    data = bytearray(path.read_bytes())
    data[tensor.start + 9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a.safetensors: piece 1 of 'a' is damaged"):
        check_pieces("a", tensor, pieces)
