"""Recordings of TensorRT-LLM: the directory of expert statistics.

`meta_info.json` {`num_experts`, `num_experts_per_token`} and, for each rank, `rank{r}.safetensors`
with tensors "{iteration}_{layer}", int64[E] or int64[S]: choices of that rank's own tokens. The
load of an iteration is the sum over the files. With a load balancer on, TensorRT-LLM counts by
slot, and its `num_experts` is then the number of slots: nothing in the directory tells.

Axes: W iterations, L layers, E experts, S slots.
"""

import json
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, Unpack

import numpy as np
import safetensors
import safetensors.numpy

from jax_eplb.formats.arrays import Options, check_options, known_experts
from jax_eplb.formats.files import naming, read_json, replacing
from jax_eplb.load import Recording

_META = "meta_info.json"
_NUMBER = "0|[1-9][0-9]{0,17}"

# Beside the library's own error: what it raises where numpy lacks the dtype, such as bfloat16.
_DAMAGE = (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError)


class _Meta(NamedTuple):
    num_experts: int
    experts_per_token: int
    unit: Literal["experts", "slots"] | None  # only `save_recording` writes it


def load_recording(directory: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read a directory of expert statistics, summed over its rank files.

    Counts are by slot where the options say `unit="slots"`, or give the placement that was active,
    or the tensors are longer than the number of experts; by expert otherwise. `num_experts`, from
    the options or that placement, stands above the one in `meta_info.json`. With an online
    balancer the placement changes between iterations, so that counts by slot mean nothing fixed:
    record without it.

    Raises ValueError naming file, tensor and fault; the iterations and layers must form a complete
    grid, the same in every rank file.
    """
    check_options(options)
    directory = Path(directory)
    if not directory.is_dir():
        fault = "is a file, expected a directory" if directory.exists() else "no such directory"
        raise ValueError(f"{directory}: {fault}")
    meta = _read_meta(directory / _META)
    paths = _rank_files(directory)
    counts, iterations, layers = _sum_ranks(paths)
    width = counts.shape[2]
    num_experts = known_experts(options) or meta.num_experts
    if width < num_experts:
        raise ValueError(
            f"{paths[0]}: tensors of {width} counts cannot hold {num_experts} experts, the number "
            f"in {_META} or given"
        )
    placement = options.get("active_placement")
    balanced = placement is not None or width > num_experts
    return Recording(
        counts=counts,
        num_experts=num_experts,
        experts_per_token=options.get("experts_per_token") or meta.experts_per_token,
        unit=options.get("unit") or meta.unit or ("slots" if balanced else "experts"),
        layer_ids=layers,
        iterations=iterations,
        placement=placement,
        source=str(directory),
    )


def save_recording(recording: Recording, directory: str | os.PathLike) -> None:
    """Write a directory of expert statistics, all counts in one `rank0.safetensors`.

    `meta_info.json` gets one key more than TensorRT-LLM's, `unit`, so that counts by slot are
    known when read again. Neither the active placement nor the tokens by rank are kept. Raises
    ValueError where the directory holds files of other ranks, which would be added on reading.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    others = [path.name for rank, path in _rank_numbers(directory).items() if rank != 0]
    if others:
        raise ValueError(f"{directory}: holds {others[0]} already; choose an empty directory")
    for name, ids in (("iteration", recording.iterations), ("layer", recording.layer_ids)):
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(f"{recording.source}: {name} numbers {ids} repeat, or are negative")
    tensors = {
        f"{iteration}_{layer}": np.ascontiguousarray(recording.counts[w, position])
        for w, iteration in enumerate(recording.iterations)
        for position, layer in enumerate(recording.layer_ids)
    }
    meta = {
        "num_experts": int(recording.num_experts),
        "num_experts_per_token": int(recording.experts_per_token),
        "unit": recording.unit,
    }
    with replacing(directory / "rank0.safetensors") as file:
        file.write(safetensors.numpy.save(tensors))
    with replacing(directory / _META) as file:
        file.write(json.dumps(meta).encode())


def _read_meta(path: Path) -> _Meta:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a directory of expert statistics has one")
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: holds a {type(meta).__name__}, expected an object")
    for key in ("num_experts", "num_experts_per_token"):
        if key not in meta:
            raise ValueError(f"{path}: the key {key} is missing")
        if type(meta[key]) is not int or meta[key] < 1:
            raise ValueError(f"{path}: {key} is {meta[key]!r}, expected a positive integer")
    unit = meta.get("unit")
    if unit not in (None, "experts", "slots"):
        raise ValueError(f"{path}: unit is {unit!r}, expected 'experts' or 'slots'")
    return _Meta(meta["num_experts"], meta["num_experts_per_token"], unit)


def _rank_numbers(directory: Path) -> dict[int, Path]:
    """Rank files by number; TensorRT-LLM's `rank0_raw.safetensors` and the like are others."""
    matches = (
        (re.fullmatch(rf"rank({_NUMBER})\.safetensors", path.name), path)
        for path in directory.iterdir()
    )
    return {int(match[1]): path for match, path in sorted(matches, key=lambda m: m[1]) if match}


def _rank_files(directory: Path) -> list[Path]:
    paths = _rank_numbers(directory)
    if not paths:
        raise ValueError(f"{directory}: no file rank0.safetensors; nothing was recorded here")
    for rank in range(len(paths)):
        if rank not in paths:
            raise ValueError(
                f"{directory}: no file rank{rank}.safetensors, but rank{max(paths)}.safetensors; "
                "the load is the sum over all ranks, so all files are needed"
            )
    return [paths[rank] for rank in range(len(paths))]


def _sum_ranks(paths: list[Path]) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """int64[W, L, E or S], the iterations and the layers."""
    grid, total = _read_rank(paths[0])
    iterations = tuple(sorted({iteration for iteration, _ in grid}))
    layers = tuple(sorted({layer for _, layer in grid}))
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in grid:
                raise ValueError(
                    f"{paths[0]}: no tensor '{iteration}_{layer}' (iteration {iteration}, layer "
                    f"{layer}); all layers must be recorded in all iterations"
                )
    for path in paths[1:]:
        names, counts = _read_rank(path)
        if names != grid:
            iteration, layer = min(set(names) ^ set(grid))
            has, lacks = (path, paths[0]) if (iteration, layer) in names else (paths[0], path)
            raise ValueError(
                f"{lacks}: no tensor '{iteration}_{layer}' (iteration {iteration}, layer {layer}), "
                f"which {has.name} has; all ranks must record the same"
            )
        if counts.shape != total.shape:
            raise ValueError(
                f"{path}: tensors of {counts.shape[1]} counts, but {total.shape[1]} in "
                f"{paths[0].name}; the files are of different runs"
            )
        total = total + counts
    return total.reshape(len(iterations), len(layers), -1), iterations, layers


def _read_rank(path: Path) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(iteration, layer) of each tensor in ascending order, and int64[W L, E or S]."""
    with naming(path, "damaged .safetensors file", *_DAMAGE):
        tensors = safetensors.numpy.load_file(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensor")
    named = sorted((_parse_name(name, path), name) for name in tensors)
    width = tensors[named[0][1]].size
    for _, name in named:
        _check_tensor(tensors[name], width, f"{path}: tensor '{name}'")
    counts = np.stack([tensors[name] for _, name in named]).astype(np.int64)
    if counts.min() < 0:
        row, column = np.unravel_index(counts.argmin(), counts.shape)
        raise ValueError(
            f"{path}: tensor '{named[row][1]}': negative count {counts[row, column]} at {column}"
        )
    return [place for place, _ in named], counts


def _parse_name(name: str, path: Path) -> tuple[int, int]:
    match = re.fullmatch(rf"({_NUMBER})_({_NUMBER})", name)
    if match is None:
        raise ValueError(f"{path}: tensor '{name}': expected a name {{iteration}}_{{layer}}")
    return int(match[1]), int(match[2])


def _check_tensor(tensor: np.ndarray, width: int, place: str) -> None:
    if not np.issubdtype(tensor.dtype, np.integer):
        raise ValueError(f"{place} is {tensor.dtype}, expected integer counts")
    if tensor.ndim != 1 or not tensor.size:
        raise ValueError(f"{place} has shape {tensor.shape}, expected one dimension of counts")
    if tensor.size != width:
        raise ValueError(f"{place} has {tensor.size} counts, but others have {width}")
