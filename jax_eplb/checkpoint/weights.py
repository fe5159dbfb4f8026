"""Named arrays with facts about them, in one safetensors file. Experts stand in expert order."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def save_weights(arrays: Mapping[str, np.ndarray], path: str | os.PathLike, facts: Any) -> None:
    """Write arrays and JSON facts; an existing file is replaced at once or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"facts": json.dumps(facts)}
    partial.write_bytes(safetensors.numpy.save(contiguous, metadata=metadata))
    partial.replace(path)


def load_weights(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], Any]:
    """Read what `save_weights` wrote: the arrays by name, and the facts.

    Raises ValueError that names the file where it is missing, damaged or without facts.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        arrays = safetensors.numpy.load(data)
        (header_size,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
        facts = json.loads(metadata["facts"])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    except (KeyError, json.JSONDecodeError):
        raise ValueError(
            f"{path}: no 'facts' in its metadata; it was not written by jax_eplb"
        ) from None
    return arrays, facts
