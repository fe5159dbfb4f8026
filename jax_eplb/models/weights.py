"""A decoder's weights on disk, in expert order: one file, or a checkpoint of many.

The byte model's file comes along.
"""

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jax_eplb.checkpoint import load_weights, restore, save_weights
from jax_eplb.models import parameters
from jax_eplb.models.config import DecoderConfig, read_config
from jax_eplb.models.decoder import DecoderParams
from jax_eplb.placement import Placement


class SavedDecoder(NamedTuple):
    """A decoder on the host, in expert order."""

    config: DecoderConfig
    params: DecoderParams
    facts: dict[str, Any]  # steps, held-out bits per byte

    def on_mesh(self, placement: Placement, mesh: Mesh, axis_name: str, dtype) -> DecoderParams:
        """The parameters on the mesh, experts by slot; all but the router of this dtype."""
        table = np.asarray(placement.slot_to_expert)
        return parameters.on_mesh(self.params, table, self.config, mesh, axis_name, dtype)


class StoredDecoder(NamedTuple):
    """A decoder in a folder of checkpoints, the last of which counts."""

    config: DecoderConfig
    folder: Path

    def on_mesh(self, placement: Placement, mesh: Mesh, axis_name: str, dtype) -> DecoderParams:
        """As of a `SavedDecoder`; each device reads the experts that it holds, and nothing else.

        Raises ValueError that names the array which is missing, damaged, or of another model.
        """
        like = parameters.like(self.config, placement.num_slots, mesh, axis_name, dtype)
        return restore(self.folder, like, placement).state


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


def load_model(config_path: str | os.PathLike) -> SavedDecoder | StoredDecoder:
    """Read the model that a file of `configs/` describes, and check that its weights fit.

    `weights: embedded` (the default) names those inside this package; anything else is a path,
    relative to the file: of a file, or of a folder of checkpoints, whose arrays are read when they
    are placed. Raises ValueError where the `model` section is not the weights' own.
    """
    values = read_config(config_path)
    config = DecoderConfig.from_dict(values["model"], str(config_path))
    named = values.get("weights", "embedded")
    folder = Path(config_path).parent / named
    if named != "embedded" and folder.is_dir():
        return StoredDecoder(config, folder)
    saved = load_decoder(None if named == "embedded" else Path(config_path).parent / named)
    theirs = dataclasses.asdict(saved.config)
    for name, value in dataclasses.asdict(config).items():
        if value != theirs[name]:
            raise ValueError(
                f"{config_path}: {name} is {value}, but the weights ({named}) were made with "
                f"{theirs[name]}"
            )
    return saved
