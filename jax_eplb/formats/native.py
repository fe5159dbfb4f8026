"""Our own recording file: everything a Recording holds, as one `.npz` or `.safetensors` file.

A `.npy` file holds the counts by expert alone.

Arrays: `counts` int64[W, L, E or S], `layer_ids` int64[L], `iterations` int64[W], and, where known,
`rank_tokens` int64[W, L, P] and `slot_to_expert` int32[L, S]. The rest is a JSON object, "jax_eplb"
in the metadata of a `.safetensors` file and the array `jax_eplb` of an `.npz` file: `format`,
`version`, `unit`, `num_experts`, `experts_per_token` and, with a placement, `num_ranks`.

Axes: W windows, L layers, E experts, S slots, P ranks.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import safetensors
import safetensors.numpy

from jax_eplb.formats.arrays import Options, check_options, recording_from_array
from jax_eplb.formats.files import check_file, naming, prefixing, read_npz, replacing
from jax_eplb.load import Recording
from jax_eplb.placement import Placement

FORMAT = "jax_eplb.recording"
VERSION = 1
_METADATA = "jax_eplb"


def save_npz(recording: Recording, path: str | os.PathLike) -> None:
    """Write the whole recording as a compressed `.npz` file."""
    arrays: dict[str, Any] = {_METADATA: np.array(json.dumps(_metadata(recording)))}
    arrays.update(_arrays(recording))
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def save_safetensors(recording: Recording, path: str | os.PathLike) -> None:
    """Write the whole recording as a `.safetensors` file."""
    metadata = {_METADATA: json.dumps(_metadata(recording))}
    with replacing(path) as file:
        file.write(safetensors.numpy.save(_arrays(recording), metadata))


def save_npy(recording: Recording, path: str | os.PathLike) -> None:
    """Write the counts by expert, int64[W, L, E], and nothing else, as a `.npy` file.

    Raises ValueError where they are counts of slots whose placement is not known.
    """
    counts = recording.expert_counts()
    with replacing(path) as file:
        np.save(file, counts, allow_pickle=False)


def load_npz(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read our own `.npz` file, or one of a plain array [W, L, E] (its only one, or `counts`).

    Our own file says everything; an option may add the placement, but not contradict it. For a
    plain array the options are those of `recording_from_array`. Raises ValueError naming the file,
    the array and the fault.
    """
    path = check_file(path)
    arrays = read_npz(path)
    if _METADATA in arrays:
        metadata = arrays.pop(_METADATA)
        if metadata.ndim or metadata.dtype.kind != "U":
            raise ValueError(f"{path}: array {_METADATA!r} is {metadata.dtype}, expected text")
        recording = _recording(arrays, str(metadata), path)
        return _with_options(recording, options)
    return _plain(arrays, path, options)


def load_safetensors(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read our own `.safetensors` file, or one of a plain tensor; as `load_npz`."""
    path = check_file(path)
    # AttributeError, TypeError: dtypes that numpy lacks, such as float8.
    faults = (safetensors.SafetensorError, OSError, ValueError, AttributeError, TypeError, KeyError)
    with (
        naming(path, "damaged .safetensors file", *faults),
        safetensors.safe_open(path, "np") as file,
    ):
        header = file.metadata() or {}
        names = file.keys()
        arrays = {name: file.get_tensor(name) for name in names}
    if _METADATA in header:
        recording = _recording(arrays, header[_METADATA], path)
        return _with_options(recording, options)
    return _plain(arrays, path, options)


def _arrays(recording: Recording) -> dict[str, np.ndarray]:
    arrays = {
        "counts": recording.counts,
        "layer_ids": np.array(recording.layer_ids, np.int64),
        "iterations": np.array(recording.iterations, np.int64),
    }
    if recording.rank_tokens is not None:
        arrays["rank_tokens"] = np.asarray(recording.rank_tokens, np.int64)
    if recording.placement is not None:
        arrays["slot_to_expert"] = np.asarray(recording.placement.slot_to_expert, np.int32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _metadata(recording: Recording) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "unit": recording.unit,
        "num_experts": int(recording.num_experts),
        "experts_per_token": int(recording.experts_per_token),
    }
    if recording.placement is not None:
        metadata["num_ranks"] = int(recording.placement.num_ranks)
    return metadata


def _read_metadata(text: str, path: Path) -> dict[str, Any]:
    with naming(path, "the metadata 'jax_eplb' is no JSON", ValueError, RecursionError):
        metadata = json.loads(text)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: the metadata 'jax_eplb' does not say format {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {metadata.get('version')!r} of the recording format; this jax_eplb "
            f"reads version {VERSION}"
        )
    for name in ("num_experts", "experts_per_token"):
        value = metadata.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: metadata {name} is {value!r}, expected a positive integer")
    if metadata.get("unit") not in ("experts", "slots"):
        raise ValueError(
            f"{path}: metadata unit is {metadata.get('unit')!r}, expected 'experts' or 'slots'"
        )
    return metadata


def _recording(arrays: dict[str, np.ndarray], text: str, path: Path) -> Recording:
    metadata = _read_metadata(text, path)
    for name, ndim in (("counts", 3), ("layer_ids", 1), ("iterations", 1)):
        _check_array(arrays, name, ndim, path)
    layer_ids = _ids(arrays["layer_ids"], "layer_ids", path)
    placement = rank_tokens = None
    if "rank_tokens" in arrays:
        _check_array(arrays, "rank_tokens", 3, path)
        rank_tokens = arrays["rank_tokens"].astype(np.int64)
    if "slot_to_expert" in arrays:
        _check_array(arrays, "slot_to_expert", 2, path)
        num_ranks = metadata.get("num_ranks")
        if type(num_ranks) is not int:
            raise ValueError(f"{path}: metadata num_ranks is {num_ranks!r}, expected an integer")
        with prefixing(f"{path}: array 'slot_to_expert'"):
            placement = Placement.from_slots(
                arrays["slot_to_expert"],
                num_experts=metadata["num_experts"],
                num_ranks=num_ranks,
                layer_ids=layer_ids,
            )
    return Recording(
        counts=arrays["counts"],
        num_experts=metadata["num_experts"],
        experts_per_token=metadata["experts_per_token"],
        unit=metadata["unit"],
        layer_ids=layer_ids,
        iterations=_ids(arrays["iterations"], "iterations", path),
        placement=placement,
        rank_tokens=rank_tokens,
        source=str(path),
    )


def _check_array(arrays: dict[str, np.ndarray], name: str, ndim: int, path: Path) -> None:
    if name not in arrays:
        raise ValueError(f"{path}: no array {name!r}; it holds {sorted(arrays)}")
    array = arrays[name]
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{path}: array {name!r} is {array.dtype} of shape {array.shape}, expected integers "
            f"in {ndim} dimensions"
        )


def _ids(array: np.ndarray, name: str, path: Path) -> tuple[int, ...]:
    ids = tuple(array.tolist())
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{path}: array {name!r} holds {twice} twice")
    return ids


def _with_options(recording: Recording, options: Options) -> Recording:
    """The recording with the placement added; ValueError where an option contradicts the file."""
    check_options(options)
    for name in ("unit", "num_experts", "experts_per_token"):
        given, held = options.get(name), getattr(recording, name)
        if given not in (None, held):
            raise ValueError(
                f"{recording.source}: its {name} is {held!r}, but {given!r} was given; leave the "
                "option out, this file says everything itself"
            )
    given, held = options.get("active_placement"), recording.placement
    if given is None or (held is not None and _same(given, held)):
        return recording
    if held is not None:
        raise ValueError(
            f"{recording.source}: holds the placement that was active, and another one was given; "
            "leave the option out"
        )
    return dataclasses.replace(recording, placement=given)


def _same(one: Placement, other: Placement) -> bool:
    sizes = ("num_experts", "num_ranks", "layer_ids", "num_slots")
    return all(getattr(one, size) == getattr(other, size) for size in sizes) and np.array_equal(
        np.asarray(one.slot_to_expert), np.asarray(other.slot_to_expert)
    )


def _plain(arrays: dict[str, np.ndarray], path: Path, options: Options) -> Recording:
    name = "counts" if "counts" in arrays else next(iter(arrays), "")
    if name != "counts" and len(arrays) != 1:
        raise ValueError(
            f"{path}: not a recording of jax_eplb, and its counts cannot be told from other "
            f"arrays: {sorted(arrays)}; keep them alone, or name them 'counts'"
        )
    return recording_from_array(arrays[name], source=f"{path}: array {name!r}", **options)
