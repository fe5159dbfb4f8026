"""Recordings and placements as files: TensorRT-LLM's, SGLang's, and our own.

`load_recording` and `save_recording` choose the format by what the path is:

| path | format |
| --- | --- |
| a directory | TensorRT-LLM's expert statistics: `meta_info.json`, `rank{r}.safetensors` |
| `.npz`, `.safetensors` | our own, with all of it; or a plain array [W, L, E] |
| `.npy` | counts alone; SGLang-JAX's |
| `.pt` | SGLang's; read only |
"""

import os
from pathlib import Path
from typing import Unpack

from jax_eplb.formats import native, sglang, tensorrt_llm
from jax_eplb.formats.arrays import Options as Options
from jax_eplb.formats.tensorrt_llm import load_placement as load_placement
from jax_eplb.formats.tensorrt_llm import save_placement as save_placement
from jax_eplb.load import Recording

_KNOWN = (
    "a directory (TensorRT-LLM's expert statistics), .npz or .safetensors (jax_eplb's own), "
    ".npy (SGLang-JAX, or counts alone)"
)

_LOADERS = {
    ".npz": native.load_npz,
    ".safetensors": native.load_safetensors,
    ".npy": sglang.load_npy,
    ".pt": sglang.load_pt,
}

_SAVERS = {
    ".npz": native.save_npz,
    ".safetensors": native.save_safetensors,
    ".npy": sglang.save_npy,
}


def load_recording(path: str | os.PathLike, **options: Unpack[Options]) -> Recording:
    """Read a recording of any known format.

    Options, for what the file does not say itself: `unit`, "experts" or "slots";
    `num_experts`; `experts_per_token`; `active_placement`, the Placement in force while the counts
    were recorded. Raises ValueError naming the file and the fault.
    """
    path = Path(path)
    if path.is_dir():
        return tensorrt_llm.load_recording(path, **options)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.suffix not in _LOADERS:
        raise ValueError(
            f"{path}: unknown format {path.suffix!r}; a recording is {_KNOWN}, or .pt (SGLang)"
        )
    return _LOADERS[path.suffix](path, **options)


def save_recording(recording: Recording, path: str | os.PathLike) -> None:
    """Write a recording in the format that the path's suffix names; no suffix is a directory.

    `.npz` and `.safetensors` keep all of it, a directory the counts and their unit, `.npy` the
    counts by expert alone. Raises ValueError for any other suffix.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        tensorrt_llm.save_recording(recording, path)
        return
    if path.suffix not in _SAVERS:
        raise ValueError(f"{path}: no format to write {path.suffix!r}; use {_KNOWN}")
    _SAVERS[path.suffix](recording, path)
