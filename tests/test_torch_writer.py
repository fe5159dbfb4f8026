"""Files of torch.save, written: the same bytes each time, and what our own reader makes of them."""

import io
import zipfile

import numpy as np
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from jax_eplb.formats.torch_file import read_torch_file
from jax_eplb.formats.torch_writer import write_torch_file


@given(arrays(np.int32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_arrays_are_read_back(tmp_path_factory, array):
    path = tmp_path_factory.mktemp("pt") / "a.pt"
    with path.open("wb") as file:
        write_torch_file(file, {"one": array, "ünï": array.T})
    read = read_torch_file(path)
    assert list(read) == ["one", "ünï"]
    np.testing.assert_array_equal(read["one"], array)
    np.testing.assert_array_equal(read["ünï"], array.T)
    assert read["one"].dtype == np.int64


def test_the_archive_has_what_torch_looks_for_and_the_same_bytes_each_time():
    first, second = io.BytesIO(), io.BytesIO()
    for file in (first, second):
        write_torch_file(file, {"x": np.arange(70_000)})
    assert first.getvalue() == second.getvalue()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [
            "archive/data.pkl",
            "archive/byteorder",
            "archive/data/0",
            "archive/version",
        ]
        assert archive.read("archive/version") == b"3\n"
        # A dict, a tensor of one storage, rows of one element: written by hand from the format.
        assert archive.read("archive/data.pkl") == (
            b"\x80\x02}(X\x01\0\0\0x"
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            b"X\x07\0\0\0storagectorch\nLongStorage\nX\x01\0\0\0"
            b"0X\x03\0\0\0cpuJ\x70\x11\x01\0tQ"
            b"K\0(J\x70\x11\x01\0t(K\x01t\x89ccollections\nOrderedDict\n)RtRu."
        )
