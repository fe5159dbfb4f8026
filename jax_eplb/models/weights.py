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
from jax_eplb.models.config import DecoderConfig, read_config
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
    named = parameters.named(saved.params)
    arrays = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in named}
    save_weights(arrays, path, {"model": dataclasses.asdict(saved.config), **saved.facts})


def load_decoder(path: str | os.PathLike | None = None) -> SavedDecoder:
    """Read weights of `save_decoder`; None reads the byte model's.

    Raises ValueError that names the file, and the array that is missing or has another shape.
    """
    path = embedded_weights() if path is None else path
    arrays, facts = load_weights(path)
    model = facts.pop("model", None) if isinstance(facts, dict) else None
    config = DecoderConfig.from_dict(model, str(path))
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


def load_model(config_path: str | os.PathLike) -> SavedDecoder:
    """Read the model that a file of `configs/` describes, and check that its weights fit.

    `weights: embedded` (the default) names those inside this package; anything else is a path,
    relative to the file. Raises ValueError where the `model` section is not the weights' own.
    """
    values = read_config(config_path)
    config = DecoderConfig.from_dict(values["model"], str(config_path))
    named = values.get("weights", "embedded")
    saved = load_decoder(None if named == "embedded" else Path(config_path).parent / named)
    theirs = dataclasses.asdict(saved.config)
    for name, value in dataclasses.asdict(config).items():
        if value != theirs[name]:
            raise ValueError(
                f"{config_path}: {name} is {value}, but the weights ({named}) were made with "
                f"{theirs[name]}"
            )
    return saved
