"""What the balancer tells: events as frozen values, and those who hear them.

A listener is any function of an event. `log_event` writes to the logger `jax_eplb.online`, one
JSON object a line; `JsonLines` writes them to a file; `prometheus.BalancerMetrics` counts them.
"""

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
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
    stage: str  # "counts", "planning", "staging", "agreement", "flip" or "listener"
    layers: tuple[int, ...]  # the model's numbers; empty where it was not of certain layers
    error: str


@dataclasses.dataclass(frozen=True)
class CapacitySet:
    """The ranks have other speeds from here on."""

    step: int  # the first iteration whose counts are planned for with these
    capacity: tuple[float, ...]
    lost_ranks: tuple[int, ...]  # whose weights cannot be read any more


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


Event = LayerUpdate | Look | Failure | CapacitySet | StepSeen | Stall
Listener = Callable[[Event], None]


def as_dict(event: Event) -> dict[str, Any]:
    """The event's fields, and its kind as `event`.

    >>> as_dict(Stall(step=3, seconds=0.5))
    {'event': 'Stall', 'step': 3, 'seconds': 0.5}
    """
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def log_event(event: Event) -> None:
    """Updates at level INFO, looks at DEBUG, speeds at WARNING, failures at ERROR."""
    levels = {
        LayerUpdate: logging.INFO,
        Look: logging.DEBUG,
        CapacitySet: logging.WARNING,
        Failure: logging.ERROR,
    }
    level = levels.get(type(event))
    if level is not None and _logger.isEnabledFor(level):
        _logger.log(level, "%s", json.dumps(as_dict(event)))


class Tell:
    """Tells listeners of events, from any thread, one at a time.

    One that raises is left out from then on, which is an event, too: the model serves on where a
    log cannot be written.
    """

    def __init__(self, listeners: Sequence[Listener]):
        self._listeners, self._one_at_a_time = [*listeners], threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._one_at_a_time:
            told = [event]
            for happened in told:  # what fails is added while it is read
                for listener in [*self._listeners]:
                    try:
                        listener(happened)
                    except Exception as error:
                        self._listeners.remove(listener)
                        why = f"{listener} is told nothing more: {type(error).__name__}: {error}"
                        told.append(Failure(event.step, "listener", (), why))


class JsonLines:
    """Writes updates, speeds and failures to a file, a JSON object a line, each as it happens."""

    def __init__(self, path: str | os.PathLike):
        # Unbuffered: what a full disk did not take is not tried again by `close`, which would fail.
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115  (closed by `close`)

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerUpdate | CapacitySet | Failure):
            self._file.write(f"{json.dumps(as_dict(event))}\n".encode())

    def __repr__(self) -> str:
        return f"JsonLines({self._file.name!r})"

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
