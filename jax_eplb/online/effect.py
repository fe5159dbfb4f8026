"""What updates did to the imbalance that was measured, before and after.

Axes: L layers.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator

import numpy as np

from jax_eplb.online.events import LayerUpdate

# Iterations that a mean before or after an update is taken over, where there are as many.
_WINDOW = 10


class Effects:
    """Holds back each update until its effect was measured, or the layer changes again."""

    def __init__(self, num_layers: int):
        # Of each layer, under the placement in force.
        self._recent = [collections.deque(maxlen=_WINDOW) for _ in range(num_layers)]
        self._open: dict[int, LayerUpdate] = {}
        self._coming: list[tuple[int, LayerUpdate]] = []

    def expect(self, position: int, update: LayerUpdate) -> None:
        """An update that comes into force with the iteration `update.step`."""
        self._coming.append((position, update))

    def hasten(self, positions: Collection[int], step: int) -> None:
        """A further update of these layers leaves at `step`: what comes before it is in force then.

        So is what comes before that, as updates come into force one after the other.
        """
        late = [u.decided_at for p, u in self._coming if p in positions and u.step > step]
        for i, (position, update) in enumerate(self._coming):
            if update.decided_at <= max(late, default=-1):
                hastened = dataclasses.replace(update, step=min(update.step, step))
                self._coming[i] = position, hastened

    def forget(self) -> None:
        """The updates that are still to come will not."""
        self._coming.clear()

    def measure(
        self, iteration: int, imbalance: np.ndarray, tokens: np.ndarray
    ) -> Iterator[LayerUpdate]:
        """One iteration's imbalance and tokens, [L] each; yields the updates that are complete."""
        for position, update in [c for c in self._coming if c[1].step <= iteration]:
            yield from self._close(position)
            before = self._mean(position)
            self._recent[position].clear()
            self._open[position] = dataclasses.replace(update, imbalance_before=before)
        self._coming = [c for c in self._coming if c[1].step > iteration]
        for recent, value, some in zip(
            self._recent, imbalance.tolist(), tokens.tolist(), strict=True
        ):
            if some:
                recent.append(value)
        for position in [p for p in self._open if len(self._recent[p]) == _WINDOW]:
            yield from self._close(position)

    def close(self) -> Iterator[LayerUpdate]:
        """The updates in force whose effect was measured in part, or not at all."""
        for position in list(self._open):
            yield from self._close(position)

    def _close(self, position: int) -> Iterator[LayerUpdate]:
        update = self._open.pop(position, None)
        if update is not None:
            yield dataclasses.replace(update, imbalance_after=self._mean(position))

    def _mean(self, position: int) -> float | None:
        recent = self._recent[position]
        return sum(recent) / len(recent) if recent else None
