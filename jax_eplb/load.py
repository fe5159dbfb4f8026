"""Load: tokens routed to each expert, counted in the step and kept as recordings.

Axes: W windows (iterations), L layers, E experts, S slots, P ranks, T tokens, K choices a token.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jax_eplb.placement import Placement


def count_experts(
    experts: Int[Array, "T K"], num_experts: int, mask: Bool[Array, "T"] | None = None
) -> Int[Array, "E"]:
    """Count the choices of each expert; padding tokens (mask False) are not counted.

    >>> count_experts(jnp.array([[0, 2], [2, 1]]), 4, jnp.array([True, False])).tolist()
    [1, 0, 1, 0]
    """
    counted = jnp.ones(experts.shape, jnp.int32)
    if mask is not None:
        counted = counted * mask.astype(jnp.int32)[:, None]
    return jnp.zeros(num_experts, jnp.int32).at[experts].add(counted)


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Counts of one run, by window, layer and expert (or slot), on the host.

    `unit` says what the last axis counts. Slots only mean experts under the placement that was
    active, so a recording of slots without one can be reported but not planned from.
    """

    counts: np.ndarray  # int64[W, L, E] or int64[W, L, S]
    num_experts: int
    experts_per_token: int
    unit: Literal["experts", "slots"] = "experts"
    layer_ids: tuple[int, ...] = ()  # default: 0 .. L - 1
    iterations: tuple[int, ...] = ()  # default: 0 .. W - 1
    placement: Placement | None = None  # the one that was active, if any
    rank_tokens: np.ndarray | None = None  # int64[W, L, P]: choices computed by each rank
    source: str = "recording"  # named in errors

    def __post_init__(self):
        counts = self.counts
        if counts.ndim != 3 or 0 in counts.shape:
            raise ValueError(
                f"{self.source}: counts have shape {counts.shape}; "
                "expected [windows, layers, experts or slots], none of them 0"
            )
        if self.unit not in ("experts", "slots"):
            raise ValueError(f"{self.source}: unit is {self.unit!r}; use 'experts' or 'slots'")
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"{self.source}: counts are {counts.dtype}; expected integers")
        # Frozen: defaults that depend on shapes are filled in once, here.
        object.__setattr__(self, "counts", counts.astype(np.int64, copy=False))
        windows, layers, width = counts.shape
        object.__setattr__(self, "layer_ids", tuple(self.layer_ids) or tuple(range(layers)))
        object.__setattr__(self, "iterations", tuple(self.iterations) or tuple(range(windows)))
        if len(self.layer_ids) != layers:
            raise ValueError(f"{self.source}: {len(self.layer_ids)} layer ids for {layers} layers")
        if len(self.iterations) != windows:
            raise ValueError(f"{self.source}: {len(self.iterations)} iterations, {windows} windows")
        if counts.min() < 0:
            w, layer, e = np.unravel_index(counts.argmin(), counts.shape)
            raise ValueError(
                f"{self.source}: iteration {self.iterations[w]}, layer {self.layer_ids[layer]}, "
                f"{self.unit[:-1]} {e}: negative count {counts[w, layer, e]}"
            )
        if self.unit == "experts" and width != self.num_experts:
            raise ValueError(
                f"{self.source}: counts of {width} experts, but num_experts is {self.num_experts}"
            )
        if self.unit == "slots" and width < self.num_experts:
            raise ValueError(
                f"{self.source}: counts of {width} slots cannot hold {self.num_experts} experts"
            )
        self._check_placement()

    def _check_placement(self):
        placement = self.placement
        if placement is not None:
            if placement.num_experts != self.num_experts:
                raise ValueError(
                    f"{self.source}: the placement is for {placement.num_experts} experts, "
                    f"the recording for {self.num_experts}"
                )
            if placement.layer_ids != self.layer_ids:
                raise ValueError(
                    f"{self.source}: the placement's layers {placement.layer_ids} are not the "
                    f"recording's {self.layer_ids}"
                )
            if self.unit == "slots" and placement.num_slots != self.counts.shape[2]:
                raise ValueError(
                    f"{self.source}: the placement has {placement.num_slots} slots, the counts "
                    f"{self.counts.shape[2]}; give the placement that was active"
                )
        if self.rank_tokens is not None and self.rank_tokens.shape[:2] != self.counts.shape[:2]:
            raise ValueError(
                f"{self.source}: rank tokens have shape {self.rank_tokens.shape}, "
                f"counts {self.counts.shape}; windows and layers must agree"
            )

    def expert_counts(self) -> np.ndarray:
        """Counts by expert, int64[W, L, E], whatever was recorded.

        Raises ValueError for counts of slots without the placement that was active.
        """
        if self.unit == "experts":
            return self.counts
        if self.placement is None:
            raise ValueError(
                f"{self.source}: these counts are by slot ({self.counts.shape[2]} slots, "
                f"{self.num_experts} experts), and which expert sat in a slot is not recorded; "
                "give the load balancer file that was active (--active-load-balancer FILE), "
                "or record without a balancer"
            )
        slot_to_expert = np.asarray(self.placement.slot_to_expert)
        windows, layers, _ = self.counts.shape
        by_expert = np.zeros((windows, layers, self.num_experts), np.int64)
        for layer in range(layers):
            np.add.at(by_expert[:, layer].T, slot_to_expert[layer], self.counts[:, layer].T)
        return by_expert

    def keep(self, windows: Sequence[int] | np.ndarray) -> "Recording":
        """The recording of the windows at these positions, in this order."""
        index = np.asarray(windows, int)
        if index.size == 0:
            raise ValueError(
                f"{self.source}: no iteration is left; it holds iterations "
                f"{self.iterations[0]} to {self.iterations[-1]}"
            )
        ranks = None if self.rank_tokens is None else self.rank_tokens[index]
        return dataclasses.replace(
            self,
            counts=self.counts[index],
            iterations=tuple(self.iterations[i] for i in index),
            rank_tokens=ranks,
        )

    def between(self, start: int | None = None, stop: int | None = None) -> "Recording":
        """The recording of iterations start ≤ i < stop, by their recorded numbers."""
        low = -np.inf if start is None else start
        high = np.inf if stop is None else stop
        return self.keep([w for w, i in enumerate(self.iterations) if low <= i < high])

    def with_at_least(self, tokens: int) -> "Recording":
        """The recording of the iterations with at least so many tokens."""
        held = self.counts.sum(axis=2).max(axis=1) / self.experts_per_token
        return self.keep(np.flatnonzero(held >= tokens))


class Recorder:
    """Keeps the counts of the iterations start ≤ i < stop, as a run hands them over.

    `record` takes device arrays and returns at once: it asks for their values only when
    `_WAITING` younger iterations have been handed over, or when the recording is read.
    """

    _WAITING = 64

    def __init__(
        self,
        *,
        num_experts: int,
        experts_per_token: int,
        layer_ids: Sequence[int],
        start: int = 0,
        stop: int | None = None,
        placement: Placement | None = None,
    ):
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(
                f"the iterations to record are {start} to {stop}; use 0 ≤ start < stop"
            )
        self._range = (start, stop)
        self._sizes = (num_experts, experts_per_token, tuple(layer_ids))
        self._placement = placement
        self._waiting: collections.deque[tuple[int, Array, Array]] = collections.deque()
        self._kept: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.iteration = 0

    def record(self, expert_tokens: Int[Array, "P L E"], rank_tokens: Int[Array, "P L"]) -> None:
        """Hand over one iteration: choices by routing rank, layer and expert, and by rank."""
        start, stop = self._range
        if self.iteration >= start and (stop is None or self.iteration < stop):
            self._waiting.append((self.iteration, expert_tokens, rank_tokens))
        self.iteration += 1
        self._read(leave=self._WAITING)

    def recording(self) -> Recording:
        """All iterations kept so far; raises ValueError where there is none."""
        self._read(leave=0)
        if not self._kept:
            start, stop = self._range
            end = "the end" if stop is None else stop
            raise ValueError(
                f"nothing was recorded: the run had {self.iteration} iterations, and those from "
                f"{start} to {end} were to be kept"
            )
        iterations, counts, rank_tokens = zip(*self._kept, strict=True)
        num_experts, experts_per_token, layer_ids = self._sizes
        return Recording(
            counts=np.stack(counts),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            layer_ids=layer_ids,
            iterations=iterations,
            placement=self._placement,
            rank_tokens=np.stack(rank_tokens),
        )

    def _read(self, leave: int) -> None:
        while len(self._waiting) > leave:
            iteration, expert_tokens, rank_tokens = self._waiting.popleft()
            counts = np.asarray(expert_tokens, np.int64).sum(axis=0)
            self._kept.append((iteration, counts, np.asarray(rank_tokens, np.int64).T))
