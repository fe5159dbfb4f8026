"""Named arrays with facts about them, in one safetensors file. Experts stand in expert order."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


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
        # safetensors' own numpy reader does not know bfloat16.
        arrays = {
            name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(data)
        }
        (header_size,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
        facts = json.loads(metadata["facts"])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    except (KeyError, json.JSONDecodeError):
        raise ValueError(
            f"{path}: no facts in its metadata, or arrays that are not floats; "
            "it was not written by jax_eplb"
        ) from None
    return arrays, facts
