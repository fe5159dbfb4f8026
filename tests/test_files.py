"""Files: faults carry the file's name, and a file is written whole or not at all."""

import functools
import io
import zipfile
from typing import Any, cast

import numpy as np
import pytest

from jax_eplb.formats.files import check_file, naming, prefixing, read_npy, read_npz, replacing


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_there_once_it_is_complete(tmp_path, old):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)
    with replacing(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", cast(Any, None)])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_replacing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"), replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_must_be_a_file_that_exists(tmp_path):
    (tmp_path / "a").write_text("")
    assert check_file(str(tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(ValueError, match="gone: no such file"):
        check_file(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"is a directory; give a file"):
        check_file(tmp_path)


def test_the_given_errors_are_named_and_others_pass():
    naming_two = functools.partial(naming, "a.npy", "damaged", KeyError, EOFError)
    with pytest.raises(ValueError, match=r"^a\.npy: damaged \(KeyError: 'x'\)$"), naming_two():
        raise KeyError("x")
    with pytest.raises(ValueError, match=r"^a\.npy: damaged \(EOFError\)$"), naming_two():
        raise EOFError
    with pytest.raises(ZeroDivisionError), naming_two():
        raise ZeroDivisionError


def test_a_place_is_put_before_a_message():
    with pytest.raises(ValueError, match=r"^a\.yaml: layer 3: too long$"), prefixing("a.yaml"):
        raise ValueError("layer 3: too long")


def test_arrays_are_read(tmp_path):
    values = np.arange(6).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    read = read_npy(tmp_path / "a.npy")
    assert type(read) is np.ndarray, "in memory, independent of the file"
    np.testing.assert_array_equal(read, values)
    np.savez(tmp_path / "a.npz", x=values, y=np.float32(1))
    named = read_npz(tmp_path / "a.npz")
    assert list(named) == ["x", "y"]
    np.testing.assert_array_equal(named["x"], values)


def test_pickled_objects_are_refused(tmp_path):
    objects = np.array([{}], object)
    np.save(tmp_path / "a.npy", objects)
    with pytest.raises(ValueError, match=r"a\.npy: damaged \.npy file \(ValueError"):
        read_npy(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", good=np.ones(2), bad=objects)
    with pytest.raises(ValueError, match=r"a\.npz: array 'bad' is damaged \(ValueError"):
        read_npz(tmp_path / "a.npz")


def test_a_header_cannot_claim_more_than_the_file_holds(tmp_path):
    path = tmp_path / "a.npy"
    header = {"descr": "<i8", "fortran_order": False, "shape": (2**40,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))
    with pytest.raises(ValueError, match=r"a\.npy: damaged \.npy file \("):
        read_npy(path)


def test_a_single_array_or_another_file_is_no_archive(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(2))
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz archive; .* a single array"):
        read_npz(path)
    for content in (b"", b"hello", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: not an \.npz archive, or a truncated one"):
            read_npz(path)


def test_the_damaged_array_of_an_archive_is_named(tmp_path):
    path, buffer = tmp_path / "a.npz", io.BytesIO()
    np.save(buffer, np.arange(4))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.npy", buffer.getvalue())
        archive.writestr("short.npy", buffer.getvalue()[:-1])
    with pytest.raises(ValueError, match=r"a\.npz: array 'short' is damaged"):
        read_npz(path)
