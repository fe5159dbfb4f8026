"""What the command line gives to every section: opponents, recordings, how often, how far it got.

Axes: W windows, L layers, E experts, S slots, P ranks.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import Progress

from benchmarks.loads import NUM_LAYERS, Size
from benchmarks.peers import Peer, PeerError, PeerResult, Peers
from benchmarks.recording_files import Recording
from benchmarks.recordings import window_imbalance
from jax_eplb.planner import Plan, plan
from tests.greedy_reference import greedy_plan

EFFORTS = ("fast", "default", "best")
# The effort that each opponent is measured against: it should need no more time.
MATCHED_EFFORT = {
    "deepseek": "fast",
    "greedy": "fast",
    "vllm": "default",
    "sglang": "fast",
    "snake": "fast",
    "flashlb": "default",
    "flashlb-deep": "best",
    "swift": "fast",
}

Item = TypeVar("Item")


@dataclasses.dataclass
class Setting:
    """Opponents run in `peers`, which must have been entered; without any, ours run alone."""

    opponents: Sequence[Peer] = ()
    peers: Peers | None = None
    peer_threads: int | None = None
    recordings: Sequence[Recording] = ()
    repeats: int = 5
    num_layers: int = NUM_LAYERS
    efforts: Sequence[str] = EFFORTS
    figure: Path | None = None
    progress: Progress | None = None

    @property
    def usual_effort(self) -> str:
        """The one that plans are made with where only one sort is measured."""
        return "default" if "default" in self.efforts else self.efforts[-1]

    def track(self, items: Iterable[Item], title: str) -> Iterator[Item]:
        """The items, with a bar that moves on as they are used up."""
        items = list(items)
        if self.progress is None:
            yield from items
        else:
            yield from self.progress.track(items, description=title)

    def ask(
        self,
        peer: Peer,
        load: np.ndarray,
        size: Size,
        notes: list[str],
        case: str,
        *,
        peers: Peers | None = None,
        repeats: int = 0,
        **options: Any,
    ) -> PeerResult | None:
        """An opponent's plan for [L, E] or [W, L, E]; None after a failure, which is noted.

        The Swift balancer only improves a table: where there is none, it is given greedy's.
        """
        peers = peers or self.peers
        assert peers is not None
        if peer.kind == "swift" and options.get("previous") is None:
            total = load if load.ndim == 2 else load.sum(axis=0)
            options["previous"] = greedy_plan(total, size.slots, size.ranks)
        sizes = {"num_slots": size.slots, "num_ranks": size.ranks}
        try:
            result = peers.plan_with(peer, load, **sizes, repeats=repeats, **options)
            failure = result.failure
        except PeerError as error:  # it died, and does not start again
            result, failure = None, str(error)
        if failure or result is None:
            lines = failure.splitlines()
            reason = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
            note = f"{peer.name}, {case}: {reason}"
            if note not in notes:
                notes.append(note)
            return None
        return result


def plan_for(size: Size, load: np.ndarray, **options: Any) -> Plan:
    """Our plan."""
    return plan(load, size.slots, size.ranks, **options)


def table_of(result: Plan) -> np.ndarray:
    """slot_to_expert on the host, int64[L, S]."""
    return np.asarray(result.placement.slot_to_expert, np.int64)


def percent(slot_to_expert: np.ndarray, load: np.ndarray, num_ranks: int) -> float:
    """Imbalance under the even split in percent, in float64, mean of windows and layers.

    load: [L, E] or [W, L, E].

    >>> percent(np.array([[0, 1]]), np.array([[3, 1]]), 2)
    50.0
    """
    windows = load if load.ndim == 3 else load[None]
    return 100 * float(window_imbalance(slot_to_expert, windows, num_ranks).mean())
