"""SGLang: placements, and recordings of its expert distribution recorder.

`--init-expert-location` reads a `.json` file, or a `.pt` file of `torch.save`, of one dict. With
`physical_to_logical_map` [layers, slots] that is the placement, and the dict must hold nothing
else; with `logical_count` SGLang plans for that load itself. Its recorder in the mode `stat` saves
such a `.pt`: `logical_count` is int[steps, layers, experts], summed over ranks, its steps a ring
buffer that ends in zeros where it was not filled. Rows are the model's layers, dense ones included.

Neither says how many experts a token chooses, nor how many ranks there are.
"""

import json
import os
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from jax_eplb.formats.arrays import Options, recording_from_array
from jax_eplb.formats.expert_locations import (
    COUNTS,
    SLOTS,
    array_of_lists,
    counts_of,
    counts_of_all_layers,
)
from jax_eplb.formats.files import check_file, check_suffix, prefixing, read_json, replacing
from jax_eplb.formats.slot_tables import rows_of_all_layers
from jax_eplb.formats.torch_file import read_torch_file
from jax_eplb.formats.torch_writer import write_torch_file
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


def load_pt(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read the `.pt` file of SGLang's recorder; torch is not needed.

    Steps and layers that counted nothing are left out; the others keep their numbers, so layer
    ids are the model's. For the options see `recording_from_array`. Raises ValueError naming the
    file and the fault.
    """
    return _recording(read_torch_file(path), path, options)


def load_json(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read `logical_count`, as nested lists, from a `.json` file; otherwise as `load_pt`."""
    content = read_json(check_file(path))
    if isinstance(content, dict) and COUNTS in content:
        with prefixing(f"{path}: {COUNTS}"):
            content = {COUNTS: array_of_lists(content[COUNTS])}
    return _recording(content, path, options)


def save_placement(
    placement: Placement, path: str | os.PathLike, *, num_layers: int | None = None
) -> None:
    """Write `physical_to_logical_map` as `.json` or `.pt`, with a row for each layer of the model.

    Dense layers get the experts in order. `num_layers`, of the model, defaults to the last MoE
    layer's id plus one. Raises ValueError for another suffix, and for fewer layers.
    """
    _save(path, {SLOTS: np.array(rows_of_all_layers(placement, num_layers))})


def save_recording(
    recording: Recording, path: str | os.PathLike, *, num_layers: int | None = None
) -> None:
    """Write `logical_count` [steps, layers, experts] as `.json` or `.pt`, dense layers as zeros.

    Raises ValueError as `save_placement`, and for counts of slots whose placement is not known.
    """
    _save(path, {COUNTS: counts_of_all_layers(recording, num_layers)})


def _save(path: str | os.PathLike, content: dict[str, np.ndarray]) -> None:
    suffix = check_suffix(path, (".json", ".pt"), "SGLang")
    with replacing(path) as file:
        if suffix == ".pt":
            write_torch_file(file, content)
        else:
            lists = {name: array.tolist() for name, array in content.items()}
            file.write(json.dumps(lists).encode())


def _recording(content: Any, path: str | os.PathLike, options: Options) -> Recording:
    with prefixing(Path(path)):
        counts = counts_of(content)
    return recording_from_array(counts, source=f"{path}: {COUNTS}", drop_idle=True, **options)
