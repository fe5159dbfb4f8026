"""Recordings of SGLang (`.pt`) and SGLang-JAX (`.npy`): counts by logical expert.

SGLang's expert distribution recorder in its mode `stat` saves, with `torch.save`, a dict whose
`logical_count` is int[steps, layers, experts], summed over ranks. Its steps are a ring buffer: not
filled up, it ends in zeros, and its rows are all of the model's layers, dense ones included.
SGLang-JAX saves, with `numpy.save`, a dict whose `logical_count` is int[layers, experts], the sum
over the steps of its buffer; a plain array [steps, layers, experts] is read as well.

Neither says how many experts a token chooses, nor which placement was active.
"""

import os
from pathlib import Path
from typing import Unpack

import numpy as np

from jax_eplb.formats.arrays import Options, recording_from_array
from jax_eplb.formats.files import DAMAGE, check_file, naming, read_npy, replacing
from jax_eplb.formats.safe_pickle import NUMPY_NAMES, PickledArray, load_pickle
from jax_eplb.formats.torch_file import read_torch_file
from jax_eplb.load import Recording


def load_pt(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read the `.pt` file of SGLang's recorder; torch is not needed.

    Steps and layers that counted nothing are left out; the others keep their numbers, so layer
    ids are the model's. For the options see `recording_from_array`. Raises ValueError naming the
    file and the fault.
    """
    counts = _logical_count(read_torch_file(path), Path(path))
    source = f"{path}: logical_count"
    return recording_from_array(counts, source=source, drop_idle=True, **options)


def load_npy(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read a `.npy` file: SGLang-JAX's dict, or a plain array [W, L, E] or [L, E].

    From a dict, layers that counted nothing are left out as in `load_pt`; an array is taken as it
    is. SGLang-JAX counts slots where its server has no expert locations: then pass
    `unit="slots"`. Raises ValueError naming the file and the fault.
    """
    path = check_file(path)
    pickled = _holds_objects(path)
    counts = _logical_count(_read_dict(path), path) if pickled else read_npy(path)
    source = f"{path}: logical_count" if pickled else str(path)
    return recording_from_array(counts, source=source, drop_idle=pickled, **options)


def save_npy(recording: Recording, path: str | os.PathLike) -> None:
    """Write the counts by expert, int64[W, L, E], and nothing else, as a `.npy` file.

    Raises ValueError where they are counts of slots whose placement is not known.
    """
    counts = recording.expert_counts()
    with replacing(path) as file:
        np.save(file, counts, allow_pickle=False)


def _logical_count(content: object, path: Path) -> np.ndarray:
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, expected a dict with 'logical_count'"
        )
    if "logical_count" not in content:
        if "records" in content:
            raise ValueError(
                f"{path}: written by SGLang in a mode of detail (per_pass or per_token), one file "
                "a rank; record with --expert-distribution-recorder-mode stat"
            )
        raise ValueError(f"{path}: no 'logical_count'; it holds {sorted(map(str, content))}")
    counts = content["logical_count"]
    if isinstance(counts, PickledArray):
        with naming(path, "array 'logical_count' is damaged", *DAMAGE):
            counts = counts.array()
    if not isinstance(counts, np.ndarray):
        raise ValueError(f"{path}: logical_count is a {type(counts).__name__}, expected a tensor")
    return counts


def _holds_objects(path: Path) -> bool:
    """Whether the array is one of Python objects, which numpy itself reads by unpickling."""
    with naming(path, "damaged .npy file", *DAMAGE), path.open("rb") as file:
        return _read_header(file)[1].hasobject


def _read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _read_dict(path: Path) -> object:
    """The one object of a 0-dimensional array of objects, which `numpy.save(path, dict)` writes."""
    with path.open("rb") as file:
        shape, _ = _read_header(file)
        if shape != ():
            raise ValueError(f"{path}: an array {shape} of objects; expected one dict, or counts")
        pickled = load_pickle(file, path, NUMPY_NAMES)
    if not isinstance(pickled, PickledArray):
        raise ValueError(f"{path}: holds a pickled {type(pickled).__name__}, expected an array")
    with naming(path, "damaged array of objects", *DAMAGE):
        return pickled.items()[0]
