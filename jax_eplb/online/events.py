"""What the balancer tells: events as frozen values, and those who hear them.

A listener is any function of an event. `log_event` writes to the logger `jax_eplb.online`, one
JSON object a line; `JsonLines` writes them to a file; `prometheus.BalancerMetrics` counts them.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_logger = logging.getLogger("jax_eplb.online")


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """The placement of one layer was changed.

    The imbalances before and after were measured in iterations; those that the plan was chosen by
    are of the load it was made for, which has less chance in it.
    """

    step: int  # the first iteration under the new placement
    decided_at: int  # iterations whose counts the plan rests on
    layer: int  # the model's number
    moves: int  # slots whose expert changed
    bytes: int  # of weights that were copied for them
    imbalance_before: float | None  # mean of the last iterations under the old placement
    imbalance_after: float | None  # mean of the first iterations under the new one
    planned_before: float  # of the load planned for, under the old placement
    imbalance_expected: float  # the same under the new one
    seconds_saved: float  # expected, for each iteration; 0 where costs are not known
    seconds_to_move: float  # expected
    seconds_to_plan: float  # of the worker, for all layers planned together
    seconds_in_flight: float  # from handing over the moves to the new placement in force


@dataclasses.dataclass(frozen=True)
class Look:
    """Layers were looked at; `changed` of them will change. None where balance was good enough."""

    step: int
    layers: tuple[int, ...]  # the model's numbers
    changed: tuple[int, ...]
    seconds: float  # of the worker


@dataclasses.dataclass(frozen=True)
class Failure:
    """Something failed; the old placement is in force."""

    step: int
    stage: str  # "counts", "planning", "staging", "agreement" or "flip"
    layers: tuple[int, ...]  # the model's numbers; empty where it was not of certain layers
    error: str


@dataclasses.dataclass(frozen=True)
class StepSeen:
    """An iteration's counts were read. Heard by listeners, not logged."""

    step: int
    imbalance: tuple[float, ...]  # measured, by layer
    layers: tuple[int, ...]  # the model's numbers
    tokens: int  # choices computed by all ranks, all layers


@dataclasses.dataclass(frozen=True)
class Stall:
    """How long the serving thread was held between two steps. Heard by listeners, not logged."""

    step: int
    seconds: float


Event = LayerUpdate | Look | Failure | StepSeen | Stall
Listener = Callable[[Event], None]


def as_dict(event: Event) -> dict[str, Any]:
    """The event's fields, and its kind as `event`.

    >>> as_dict(Stall(step=3, seconds=0.5))
    {'event': 'Stall', 'step': 3, 'seconds': 0.5}
    """
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def log_event(event: Event) -> None:
    """Updates at level INFO, looks at DEBUG, failures at ERROR."""
    levels = {LayerUpdate: logging.INFO, Look: logging.DEBUG, Failure: logging.ERROR}
    level = levels.get(type(event))
    if level is not None and _logger.isEnabledFor(level):
        _logger.log(level, "%s", json.dumps(as_dict(event)))


class JsonLines:
    """Writes updates and failures to a file, one JSON object a line, each as it happens."""

    def __init__(self, path: str | os.PathLike):
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  (closed by `close`)

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerUpdate | Failure):
            self._file.write(json.dumps(as_dict(event)) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
