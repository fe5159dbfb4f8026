"""A decoder's weights in one file, bfloat16, in expert order; the byte model's comes along."""

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jax_eplb.checkpoint import load_weights, save_weights
from jax_eplb.models import parameters
from jax_eplb.models.config import DecoderConfig
from jax_eplb.models.decoder import DecoderParams


class SavedDecoder(NamedTuple):
    """A decoder on the host, in expert order."""

    config: DecoderConfig
    params: DecoderParams
    facts: dict[str, Any]  # steps, held-out bits per byte


def embedded_weights() -> Path:
    """The byte model's weights inside this package."""
    return Path(str(resources.files("jax_eplb.models") / "byte_moe" / "weights.safetensors"))


def save_decoder(saved: SavedDecoder, path: str | os.PathLike) -> None:
    """Write the weights as bfloat16, with the config beside them."""
    arrays = {n: np.asarray(a).astype(ml_dtypes.bfloat16) for n, a in parameters.named(saved.params)}
    save_weights(arrays, path, {"model": dataclasses.asdict(saved.config), **saved.facts})


def load_decoder(path: str | os.PathLike | None = None) -> SavedDecoder:
    """Read weights of `save_decoder`; None reads the byte model's.

    Raises ValueError that names the file, and the array that is missing or has another shape.
    """
    path = embedded_weights() if path is None else path
    arrays, facts = load_weights(path)
    config = DecoderConfig.from_dict(facts.pop("model", None), str(path))
    tree = parameters.shapes(config)
    leaves = []
    for name, shape in parameters.named(tree):
        if name not in arrays:
            raise ValueError(f"{path}: the array {name!r} is missing")
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: {name!r} has shape {arrays[name].shape}, expected {shape}")
        leaves.append(arrays[name])
    structure = jax.tree.structure(tree, is_leaf=parameters.is_shape)
    return SavedDecoder(config, jax.tree.unflatten(structure, leaves), facts)
