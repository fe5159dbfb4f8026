"""What a run that ends leaves for the next: the load it has seen, and the placement in force.

Weights are not in it. They do not change, and stand in the checkpoint that the model is read from.
"""

import os
from typing import NamedTuple

import numpy as np

from jax_eplb.checkpoint import Checkpoints
from jax_eplb.checkpoint.stored import (
    open_checkpoint,
    placement_from_json,
    placement_to_json,
    step_folders,
)
from jax_eplb.online import Balancer, kept_load
from jax_eplb.placement import Placement
from jax_eplb.planner import plan


class KeptRun(NamedTuple):
    """What was read of another run."""

    load: dict[str, np.ndarray]  # see `online.kept_load`
    placement: Placement


def keep_run(checkpoints: Checkpoints, balancer: Balancer) -> None:
    """Save the state of now, named by its iteration; waits for all counts handed over.

    Over several processes, all call it between the same two iterations.
    """
    facts = {"placement": placement_to_json(balancer.placement)}
    checkpoints.save(balancer.iteration, kept_load(balancer.state), None, facts=facts)


class RunKeeper:
    """Keeps a run every so many iterations, and when it is told to.

    Over several processes, all call the same methods between the same two iterations.
    """

    def __init__(self, checkpoints: Checkpoints, balancer: Balancer, interval: int):
        self._checkpoints, self._balancer, self._interval = checkpoints, balancer, interval
        self._kept_at = balancer.iteration

    def keep_if_due(self) -> None:
        """Keep where so many iterations have passed since the last time."""
        if self._balancer.iteration - self._kept_at >= self._interval:
            self.keep()

    def keep(self) -> None:
        """Keep the state of now, unless it is kept."""
        if self._balancer.iteration > self._kept_at:
            keep_run(self._checkpoints, self._balancer)
            self._kept_at = self._balancer.iteration


def read_run(folder: str | os.PathLike) -> KeptRun | None:
    """The last that was kept in a folder; None where there is none, or no folder.

    Raises ValueError that names what is damaged, or not of a run.
    """
    steps = step_folders(folder)
    if not steps:
        return None
    stored = open_checkpoint(steps[max(steps)])
    if not isinstance(stored.facts, dict) or "placement" not in stored.facts:
        raise ValueError(f"{stored.folder}: holds no load of a run; give the folder of one")
    load = {name: array.read()[0] for name, array in stored.arrays.items()}
    return KeptRun(load, placement_from_json(stored.facts["placement"]))


def placement_to_begin_with(kept: KeptRun, wanted: Placement, split: str) -> Placement:
    """The placement that was kept; one planned for the load kept where sizes have changed.

    Sizes are those of `wanted`, which is given back where no load was seen.
    """
    sizes = ("num_experts", "num_slots", "num_ranks", "layer_ids")
    if all(getattr(kept.placement, name) == getattr(wanted, name) for name in sizes):
        return kept.placement
    load = kept.load["load"]
    if load.shape != (wanted.num_layers, wanted.num_experts) or not load.any():
        return wanted  # of another model: whoever uses the load says so
    return plan(
        load, wanted.num_slots, wanted.num_ranks, split=split, layer_ids=wanted.layer_ids
    ).placement
