"""Updates on their way: sent beside the model's steps, put in force between two of them.

Axes: L layers, S slots.
"""

import collections
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_eplb.mesh import lay_out
from jax_eplb.moving import Banks, RowSource, Staged, apply_moves, stage_moves
from jax_eplb.online.worker import Update
from jax_eplb.tables import PlacementTables


class Flight(NamedTuple):
    """An update's weights, and the tables of all layers with it."""

    due: int  # the iteration that it is in force from
    update: Update
    staged: list[Staged]
    tables: PlacementTables
    host_tables: PlacementTables  # the same in numpy
    begun: float


class Flights:
    """The placement in force, and the updates on their way, in their order.

    `derive`: from a placement, int32[L, S], to its tables in numpy.
    """

    def __init__(self, table: np.ndarray, derive: Callable[[np.ndarray], PlacementTables]):
        self.table = table  # in force
        self.host: RowSource | None = None  # of experts that no rank has
        self._derive = derive
        self._banks: Banks | None = None
        self._tables: PlacementTables | None = None  # in force, or as soon as a step asks for them
        self._are_new = False
        self._queue: collections.deque[Flight] = collections.deque()

    def prepare(self, banks: Banks) -> None:
        """Where weights are; nothing is sent before."""
        self._banks, self._tables, self._are_new = banks, self._derive(self.table), True

    def restart(self, table: np.ndarray) -> None:
        """Go on from a placement that is in force. None on its way will be."""
        self._queue.clear()
        if self._tables is not None and table is not self.table:
            self._tables, self._are_new = self._derive(table), True
        self.table = table

    def tables_in_force(self, tables: PlacementTables) -> PlacementTables:
        """The tables given, or those that were derived anew since the last call."""
        if self._tables is not None and self._are_new:
            tables, self._are_new = _laid_out(self._tables, tables), False
        return tables

    def is_due(self, iteration: int) -> bool:
        return bool(self._queue) and self._queue[0].due <= iteration

    @property
    def next(self) -> Flight:
        """The one that will come into force first."""
        return self._queue[0]

    def touch(self, layers: np.ndarray) -> bool:
        """Whether one of these layers will change."""
        return any(np.isin(f.update.decision.layers, layers).any() for f in self._queue)

    def table_after(self, *updates: Update) -> np.ndarray:
        """int32[L, S]: the placement when all have come into force, and then these updates."""
        table = self.table.copy()
        for update in (*(flight.update for flight in self._queue), *updates):
            table[update.decision.layers] = update.decision.rows
        return table

    def send(self, update: Update, params: Any, tables: PlacementTables, due: int) -> None:
        """Send an update's rows to their new ranks, and its tables. Only dispatches.

        `tables` are those in force. Raises ValueError where an expert is on no rank, nor on a host.
        """
        before = self._queue[-1].host_tables if self._queue else self._tables
        if self._banks is None or before is None:
            raise ValueError("the balancer is not prepared: call prepare(params) first")
        begun = time.perf_counter()
        staged = [
            stage_moves(params, part, banks=self._banks, host=self.host) for part in update.moves
        ]
        after = PlacementTables(*(table.copy() for table in before))
        for table, rows in zip(after, update.tables, strict=True):
            table[update.decision.layers] = rows
        placed = _laid_out(after, tables)
        self._queue.append(Flight(due, update, staged, placed, after, begun))

    def land(self, params: Any) -> tuple[Any, Flight]:
        """Put in force what has been on its way longest: the parameters then, those given used up.

        Raises RebalanceError where writing failed: its `params` are those to go on with. What fails
        before, with any other error, leaves those given whole.
        """
        flight = self._queue.popleft()
        jax.block_until_ready([staged.arrays() for staged in flight.staged])
        params = apply_moves(params, *flight.staged)
        self.table = self.table.copy()
        self.table[flight.update.decision.layers] = flight.update.decision.rows
        self._tables = flight.host_tables
        return params, flight


def _laid_out(host: PlacementTables, tables: PlacementTables) -> PlacementTables:
    """Tables in numpy, laid out as others are."""
    return lay_out(host, jax.tree.map(lambda table: table.sharding, tables))
