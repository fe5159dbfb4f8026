"""SGLang-JAX: placements, and recordings of its expert distribution recorder.

`--init-expert-location` reads `.json` or `.npy`. A plain array in `.npy` is the placement,
[layers, slots]; a dict, in `.json` or pickled by `numpy.save`, has `physical_to_logical_map`
[layers, slots] or `logical_count` [layers, experts]. Its recorder saves the pickled dict, with
`logical_count` summed over the steps of its buffer. Rows are the model's layers, dense ones too.

A pickle is a program, so a pickled dict is read only where the caller says so. Even then it is
read by `safe_pickle`, which calls nothing that the file names.
"""

import json
import os
from pathlib import Path
from typing import Unpack

import numpy as np

from jax_eplb.formats.arrays import Options, recording_from_array
from jax_eplb.formats.expert_locations import COUNTS, SLOTS, counts_of, counts_of_all_layers
from jax_eplb.formats.files import (
    DAMAGE,
    check_file,
    check_suffix,
    naming,
    prefixing,
    read_npy,
    read_npy_header,
    replacing,
)
from jax_eplb.formats.safe_pickle import NUMPY_NAMES, PickledArray, load_pickle
from jax_eplb.formats.slot_tables import rows_of_all_layers
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


def load_npy(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read a `.npy` file: SGLang-JAX's dict, or a plain array of counts [W, L, E] or [L, E].

    The dict needs `unsafe_pickle=True`. From it, layers that counted nothing are left out as in
    `sglang.load_pt`; an array is taken as it is. SGLang-JAX counts slots where its server has no
    expert locations: then pass `unit="slots"`. Raises ValueError naming the file and the fault.
    """
    content = read_content(path, unsafe_pickle=options.get("unsafe_pickle", False))
    if isinstance(content, np.ndarray):
        return recording_from_array(content, source=str(path), **options)
    with prefixing(Path(path)):
        counts = counts_of(content)
    return recording_from_array(counts, source=f"{path}: {COUNTS}", drop_idle=True, **options)


def read_content(path: str | os.PathLike, *, unsafe_pickle: bool) -> object:
    """The array in a `.npy` file, or the object that `numpy.save` pickled into it."""
    path = check_file(path)
    with naming(path, "damaged .npy file", *DAMAGE), path.open("rb") as file:
        shape, dtype = read_npy_header(file)
    if not dtype.hasobject:
        return read_npy(path)
    if not unsafe_pickle:
        raise ValueError(
            f"{path}: holds a pickle, as SGLang-JAX writes it, and a pickle may run code; if you "
            "trust who wrote it, say so by unsafe_pickle=True (jax-eplb convert --unsafe-pickle)"
        )
    if shape != ():
        raise ValueError(f"{path}: an array {shape} of objects; expected one dict, or counts")
    return _read_object(path)


def _read_object(path: Path) -> object:
    """The one object of a 0-dimensional array of objects, which `numpy.save(path, dict)` writes."""
    with path.open("rb") as file:
        read_npy_header(file)
        pickled = load_pickle(file, path, NUMPY_NAMES)
    if not isinstance(pickled, PickledArray):
        raise ValueError(f"{path}: holds a pickled {type(pickled).__name__}, expected an array")
    with naming(path, "damaged array of objects", *DAMAGE):
        return pickled.items()[0]


def save_placement(
    placement: Placement, path: str | os.PathLike, *, num_layers: int | None = None
) -> None:
    """Write the placement as a `.json` dict, or as a plain `.npy` array int32[layers, slots].

    As `sglang.save_placement` otherwise.
    """
    suffix = check_suffix(path, (".json", ".npy"), "SGLang-JAX")
    rows = rows_of_all_layers(placement, num_layers)
    with replacing(path) as file:
        if suffix == ".npy":
            np.save(file, np.array(rows, np.int32), allow_pickle=False)
        else:
            file.write(json.dumps({SLOTS: rows}).encode())


def save_recording(
    recording: Recording, path: str | os.PathLike, *, num_layers: int | None = None
) -> None:
    """Write `logical_count` [layers, experts], the sum over all windows, as `.json`.

    Not as `.npy`, where SGLang-JAX takes an array for a placement, and counts would have to be
    pickled. Raises ValueError for any other suffix, and for counts of slots whose placement is not
    known.
    """
    check_suffix(path, (".json",), "SGLang-JAX's counts")
    counts = counts_of_all_layers(recording, num_layers).sum(axis=0)
    with replacing(path) as file:
        file.write(json.dumps({COUNTS: counts.tolist()}).encode())
