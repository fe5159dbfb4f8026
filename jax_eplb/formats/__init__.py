"""Recordings and placements as files: those of other engines, and our own.

The format is told by what is in a file, and written by what the path or the caller says:

| content | holds |
| --- | --- |
| a directory | TensorRT-LLM's expert statistics: `meta_info.json`, `rank{r}.safetensors` |
| `.npz`, `.safetensors` | our own recording, with all of it; or a plain array [W, L, E] |
| `.npy` | counts alone; SGLang-JAX's recording or placement |
| `.pt` | SGLang's recording or placement; a tensor of vLLM's |
| YAML | TensorRT-LLM's placement, `moe_load_balancer.yaml`, which is our own too |
| JSON | placements of SGLang, SGLang-JAX, vLLM, vLLM-Ascend; counts as SGLang reads them |
| other text | balancedness in a log of vLLM or SGLang |
"""

import os
from pathlib import Path
from typing import Unpack

from jax_eplb.formats import native, sglang, sglang_jax, tensorrt_llm
from jax_eplb.formats.arrays import Options as Options
from jax_eplb.formats.balancedness_log import load_balancedness as load_balancedness
from jax_eplb.formats.kinds import Kind as Kind
from jax_eplb.formats.kinds import kind_of as kind_of
from jax_eplb.formats.plans import ENGINES as ENGINES
from jax_eplb.formats.plans import holds_plan as holds_plan
from jax_eplb.formats.plans import load_layer_updates as load_layer_updates
from jax_eplb.formats.plans import load_placement as load_placement
from jax_eplb.formats.plans import load_slots as load_slots
from jax_eplb.formats.plans import save_placement as save_placement
from jax_eplb.load import Recording

_KNOWN = (
    "a directory (TensorRT-LLM's expert statistics), .npz or .safetensors (jax_eplb's own), "
    ".npy (SGLang-JAX, or counts alone)"
)

_LOADERS = {
    Kind.DIRECTORY: tensorrt_llm.load_recording,
    Kind.NPZ: native.load_npz,
    Kind.SAFETENSORS: native.load_safetensors,
    Kind.NPY: sglang_jax.load_npy,
    Kind.TORCH: sglang.load_pt,
    Kind.JSON: sglang.load_json,
}

_SAVERS = {
    ".npz": native.save_npz,
    ".safetensors": native.save_safetensors,
    ".npy": native.save_npy,
}


def load_recording(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read a recording of any known format, told by its content.

    Options, for what the file does not say itself: `unit`, "experts" or "slots";
    `num_experts`; `experts_per_token`; `active_placement`, the Placement in force while the counts
    were recorded. SGLang-JAX's pickled `.npy` needs `unsafe_pickle=True`. Raises ValueError naming
    the file and the fault.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind not in _LOADERS:
        fault = "a plan" if kind is Kind.YAML else f"unknown format {path.suffix!r}"
        raise ValueError(f"{path}: {fault}; a recording is {_KNOWN}, or .pt or .json (SGLang)")
    return _LOADERS[kind](path, **options)


def save_recording(recording: Recording, path: str | os.PathLike) -> None:
    """Write a recording in the format that the path's suffix names; no suffix is a directory.

    `.npz` and `.safetensors` keep all of it, a directory the counts and their unit, `.npy` the
    counts by expert alone. For other engines see `convert`. Raises ValueError for any other suffix.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        tensorrt_llm.save_recording(recording, path)
        return
    if path.suffix not in _SAVERS:
        raise ValueError(f"{path}: no format to write {path.suffix!r}; use {_KNOWN}")
    _SAVERS[path.suffix](recording, path)
