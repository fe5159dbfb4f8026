"""What kind of file a path is, by its first bytes; by its suffix only where they say nothing."""

import enum
import re
import zipfile
from pathlib import Path

from jax_eplb.formats.files import DAMAGE, NPY_MAGIC

_START = 512  # bytes that are looked at
_ZIP = b"PK\x03\x04"
# Not YAML's mappings in braces, whose keys need no quotes, nor a log's time in brackets.
_JSON = re.compile(rb'\s*(\{\s*(["}]|$)|\[\s*([\[{"\]]|-?\d+\s*[,\]]|$))')


class Kind(enum.Enum):
    """The containers that recordings and plans come in; what is in them is looked at later."""

    DIRECTORY = "directory"
    NPZ = ".npz"
    TORCH = ".pt"
    NPY = ".npy"
    SAFETENSORS = ".safetensors"
    JSON = ".json"
    YAML = ".yaml"
    UNKNOWN = ""


_BY_SUFFIX = {kind.value: kind for kind in Kind} | {".pth": Kind.TORCH, ".yml": Kind.YAML}


def kind_of(path: Path) -> Kind:
    """The kind of what is at the path; ValueError where there is nothing.

    A file that is too damaged to be told by its bytes is what its suffix says, so that the reader
    of that kind names the damage. Other text is taken for YAML only where the suffix says so.
    """
    if path.is_dir():
        return Kind.DIRECTORY
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    with path.open("rb") as file:
        start = file.read(_START)
    return _by_content(path, start) or _BY_SUFFIX.get(path.suffix, Kind.UNKNOWN)


def _by_content(path: Path, start: bytes) -> Kind | None:
    if start.startswith(NPY_MAGIC):
        return Kind.NPY
    if start.startswith(_ZIP):
        return _kind_of_archive(path)
    # A length of 8 bytes, then JSON. In text, the length would be of more bytes than there are.
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return Kind.SAFETENSORS
    if _JSON.match(start):
        return Kind.JSON
    if b"num_slots:" in start or b"initial_global_assignments:" in start:
        return Kind.YAML
    return None


def _kind_of_archive(path: Path) -> Kind | None:
    """torch.save's archives hold NAME/data.pkl, numpy's hold arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGE:
        return None
    pickled = any(name.split("/")[1:] == ["data.pkl"] for name in names)
    return Kind.TORCH if pickled else Kind.NPZ
