"""The kind of a file is told by its bytes, and by its suffix where these say nothing."""

import io
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from jax_eplb.formats.kinds import Kind, kind_of


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(3))
    return buffer.getvalue()


def pt() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("some name/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (npz(), Kind.NPZ),
        (pt(), Kind.TORCH),
        (npy(), Kind.NPY),
        (save({"x": np.arange(3)}), Kind.SAFETENSORS),
        (save({"x": np.arange(3)}, {"a": "b" * 50}), Kind.SAFETENSORS),  # its length is a brace
        (b'{"a": 1}', Kind.JSON),
        (b"\n [[0, 1]]", Kind.JSON),
        (b"[0, 1]", Kind.JSON),
        (b"{", Kind.JSON),
        (b"num_slots: 4\n", Kind.YAML),
        (b"# a plan\ninitial_global_assignments:\n", Kind.YAML),
        (b"{num_slots: 4}", Kind.YAML),
        (b"[2026-08-01 12:00:00] INFO EPLB step: 1\n", Kind.UNKNOWN),
        (b"", Kind.UNKNOWN),
        (b"PK\x03\x04 and no archive", Kind.UNKNOWN),
        (b"\x00" * 100, Kind.UNKNOWN),
    ],
)
def test_the_content_decides_whatever_the_name(tmp_path, content, kind):
    (tmp_path / "a").write_bytes(content)
    assert kind_of(tmp_path / "a") is kind
    (tmp_path / "b.npy").write_bytes(content)
    assert kind_of(tmp_path / "b.npy") is (Kind.NPY if kind is Kind.UNKNOWN else kind)


def test_the_suffix_names_what_is_too_damaged(tmp_path):
    for name, kind in (
        ("a.pt", Kind.TORCH),
        ("a.pth", Kind.TORCH),
        ("a.yaml", Kind.YAML),
        ("a.yml", Kind.YAML),
        ("a.json", Kind.JSON),
        ("a.safetensors", Kind.SAFETENSORS),
        ("a.csv", Kind.UNKNOWN),
    ):
        (tmp_path / name).write_bytes(b"")
        assert kind_of(tmp_path / name) is kind


def test_directories_and_what_is_not_there(tmp_path):
    assert kind_of(tmp_path) is Kind.DIRECTORY
    with pytest.raises(ValueError, match="gone: no such file or directory"):
        kind_of(tmp_path / "gone")
