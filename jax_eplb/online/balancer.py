"""The balancer beside a running model: counts in, plans by a worker, weights moved between steps.

    params, tables = balancer.between_steps(params, tables)
    ..., expert_tokens, rank_tokens = step(params, tables, ...)
    balancer.after_step(expert_tokens, rank_tokens)

Everything happens at iteration numbers that are fixed beforehand, so that several processes that
run this do the same: what the counts up to iteration t lead to is handed over before iteration
t + 1 + `planning_iterations` and in force `moving_iterations` later; one later over several
processes, which compare what they decided first.

Axes: L layers, E experts, P ranks.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_eplb.moving import Banks, RebalanceError, RowSource, find_banks, prepare_moves
from jax_eplb.online.capacity import checked_capacity
from jax_eplb.online.config import BalancerConfig
from jax_eplb.online.decide import Served
from jax_eplb.online.digest import Gather, Question, ask, check_agreement, gather_on_devices
from jax_eplb.online.errors import BalancerError, DigestMismatch
from jax_eplb.online.events import CapacitySet, Listener, Stall, Tell, log_event
from jax_eplb.online.flight import Flights
from jax_eplb.online.measure import measured_costs
from jax_eplb.online.state import BalancerState, looks_after, with_load
from jax_eplb.online.worker import SLOTS_AT_ONCE, Outcome, Update, Worker, failure
from jax_eplb.online.worth import Costs
from jax_eplb.placement import Placement
from jax_eplb.tables import PlacementTables

_STALLS_KEPT = 100_000


class Balancer:
    """Watches the load of a model that serves, and moves experts' weights where that pays.

    `split`: how the layer divides an expert's tokens, "balanced" for the replica choice of that
    name and "even" for others. `listeners` hear every event, from either thread, one at a time.
    `kept`: what `kept_load` gave of the state of another balancer, to go on from its iteration.
    `gather` lets processes compare what they decided (see `digest`); default: by their devices.
    """

    def __init__(
        self,
        placement: Placement,
        config: BalancerConfig,
        *,
        split: str = "balanced",
        listeners: Sequence[Listener] = (),
        ranks_per_node: int | None = None,
        kept: Mapping[str, np.ndarray] | None = None,
        gather: Gather | None = None,
    ):
        self.config, self.placement = config, placement
        if config.capacity is not None:
            checked_capacity(config.capacity, placement)
        self.served = Served(placement.num_experts, placement.num_ranks, placement.layer_ids, split)
        self.moved_slots = self.moved_bytes = self.updates = self.failures = 0
        self._tell = Tell((log_event, *listeners))
        if gather is None and jax.process_count() > 1:
            gather = gather_on_devices
        self._gather = gather
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jax_eplb-balancer")
        self._worker = Worker(
            placement,
            config,
            self.served,
            ranks_per_node=ranks_per_node,
            # What was decided is then compared for an iteration.
            iterations_to_leave=config.planning_iterations + (gather is not None),
            tell=self._tell,
        )
        if kept is not None:
            self._worker.state = with_load(self._worker.state, kept)
        self.iteration = self._worker.state.iteration  # the next one
        self._due: collections.deque = collections.deque()  # (iteration, epoch, future)
        self._asked: collections.deque = collections.deque()  # (question, epoch, outcome)
        self._epoch = 0  # of the placement that plans start from; a failure begins another
        # An update with the step's parameters and tables, sent behind it so that it does not wait.
        self._leaving: tuple[Update, Any, PlacementTables] | None = None
        self._flights = Flights(self._worker.state.table, self._worker.derive)
        self._error: Exception | None = None
        self._stalls: collections.deque[float] = collections.deque(maxlen=_STALLS_KEPT)
        self._held = 0.0

    @property
    def state(self) -> BalancerState:
        """Of all counts handed over so far; waits until they have been read."""
        return self._thread.submit(lambda: self._worker.state).result()

    @property
    def costs(self) -> Costs | None:
        """What moves are weighed by; None before `prepare`."""
        return self._worker.costs

    @property
    def stalls(self) -> np.ndarray:
        """Seconds that the serving thread was held, float64[steps], the last 100,000 of them."""
        return np.array(self._stalls)

    def prepare(
        self,
        params: Any,
        *,
        seconds_per_token: float | None = None,
        banks: Banks | None = None,
    ) -> None:
        """Compile all that updates will run, and measure what they cost; moves nothing.

        `seconds_per_token`: measured by the caller; the config's comes first. Raises ValueError
        where there is a horizon and neither is known, or the tree has no banks of the placement.
        """
        config, sizes = self.config, self.placement
        if not config.layer_updates_per_iter:
            return
        if banks is None:
            banks = find_banks(params, num_slots=sizes.num_slots, layer_ids=sizes.layer_ids)
        prepare_moves(params, SLOTS_AT_ONCE, banks=banks)
        costs = measured_costs(params, banks, config, seconds_per_token)
        self._thread.submit(self._worker.prepare, costs).result()
        self._flights.prepare(banks)
        if self._gather is not None:
            check_agreement(self._ask(Outcome(), self._gather))

    def between_steps(self, params: Any, tables: PlacementTables) -> tuple[Any, PlacementTables]:
        """Before an iteration: put in force what is on its way, and take what was decided.

        Returns the parameters and tables to go on with; the banks among those given are used up
        where a placement comes into force. `after_step` sends rows of those returned, so the step
        must leave them whole (not take them as donated). Raises BalancerError where something
        failed before (unless `stop_on_failure` is off) and DigestMismatch where processes
        disagreed: everything is then as it was.
        """
        begun = time.perf_counter()
        self._raise_error()
        tables = self._flights.tables_in_force(tables)
        while self._flights.is_due(self.iteration):
            params, tables = self._flip(params, tables)
        while self._asked:
            question, epoch, outcome = self._asked.popleft()
            if epoch == self._epoch and self._do_agree(question):
                params, tables = self._take(outcome, params, tables)
        while self._due and self._due[0][0] <= self.iteration:
            due, epoch, future = self._due.popleft()
            outcome = future.result()
            if epoch != self._epoch:
                continue
            iterations = due - self.config.planning_iterations
            if self._gather is None or not looks_after(iterations, self.config):
                params, tables = self._take(outcome, params, tables)
            else:
                self._asked.append((self._ask(outcome, self._gather), epoch, outcome))
        self._held += time.perf_counter() - begun
        return params, tables

    def after_step(self, expert_tokens: Any, rank_tokens: Any) -> None:
        """Hand over an iteration's counts: int[P, L, E] by routing rank, and int[P, L] by rank.

        Device arrays of a step that may still run; returns at once. Arrays that other processes
        hold parts of must come replicated. What was decided goes on its way, behind the step.
        """
        begun = time.perf_counter()
        self._send()
        work = self._thread.submit(self._worker.work, self.iteration, expert_tokens, rank_tokens)
        due = self.iteration + 1 + self.config.planning_iterations
        self._due.append((due, self._epoch, work))
        self._held += time.perf_counter() - begun
        self._stalls.append(self._held)
        self._tell(Stall(self.iteration, self._held))
        self.iteration, self._held = self.iteration + 1, 0.0

    def reset(self, placement: Placement) -> None:
        """Go on from another placement, which was put in force by other means; the load is kept.

        Raises ValueError where it is of another model, or of other sizes.
        """
        for name in ("num_experts", "num_slots", "num_ranks", "layer_ids"):
            ours, theirs = getattr(self.placement, name), getattr(placement, name)
            if ours != theirs:
                raise ValueError(
                    f"the placement has {name} {theirs}, the balancer's {ours}; use one of this "
                    "model and mesh"
                )
        self.placement = placement
        self._start_anew(np.asarray(placement.slot_to_expert, np.int32))

    def set_capacity(
        self,
        capacity: Sequence[float],
        *,
        lost_ranks: Collection[int] = (),
        host: RowSource | None = None,
    ) -> None:
        """From the next iteration's counts on, plan for ranks of these relative speeds.

        A rank has become slow, is to be left alone (0), or came back. The next looks move all
        experts off ranks of speed 0, K layers each, before another layer changes; `balanced`
        divides tokens by these speeds at once. What is on its way is dropped; nothing is compiled.
        Called between two iterations, the same two on every process; waits until the counts of
        those before have been read.

        `lost_ranks`: of those of speed 0, the ones whose weights cannot be read any more. Experts
        that no other rank has come from `host`, such as a `HostCopy`, which is kept for that. Later
        calls need not name them again; a speed above 0 says that a rank is whole, once it is empty.

        Raises ValueError, and all stays as it was, where the balancer is static, the ranks left
        have too few slots for all experts, a lost rank has a speed or is back too soon, or experts
        are lost with a rank and there is no `host`.
        """
        if not self.config.layer_updates_per_iter:
            raise ValueError("layer_updates_per_iter is 0, so no expert would move; set it to 1")
        host = self._flights.host if host is None else host
        work = self._worker.set_capacity, capacity, lost_ranks, self.placement, host is not None
        self._thread.submit(*work).result()
        self._flights.host = host
        self._start_anew(self._flights.table.copy())
        self._tell(CapacitySet(self.iteration, tuple(map(float, capacity)), tuple(lost_ranks)))

    def flush(self) -> None:
        """Wait until all counts were read, and tell of the updates whose effect is not yet known.

        Raises the error of a failure that nothing has raised yet.
        """
        self._thread.submit(self._worker.close_effects).result()
        self._raise_error()

    def close(self) -> None:
        """End the worker. What is on its way does not come into force."""
        self._thread.shutdown()

    def _flip(self, params: Any, tables: PlacementTables) -> tuple[Any, PlacementTables]:
        """Put in force what has been on its way longest."""
        layers = self._flights.next.update.decision.layers
        try:
            params, flight = self._flights.land(params)
        except Exception as error:
            self._fail("flip", layers, error)
            if not isinstance(error, RebalanceError):
                return params, tables
            if error.params is None:
                self._error = None  # it would say that the old placement is in force
                raise
            return error.params, tables
        decision = flight.update.decision
        self.placement = dataclasses.replace(self.placement, slot_to_expert=flight.tables[0])
        self._worker.note_flight(decision.iteration, time.perf_counter() - flight.begun)
        moved, costs = int(decision.moves.sum()), self._worker.costs
        self.moved_slots += moved
        self.moved_bytes += moved * (0 if costs is None else costs.bytes_per_slot)
        self.updates += decision.layers.size
        return params, flight.tables

    def _ask(self, outcome: Outcome, gather: Gather) -> Question:
        """Ask the other processes whether they came to the same."""
        leaving = self._leaving and self._leaving[0]
        wanted = self._flights.table_after(*filter(None, [leaving, outcome.update]))
        if outcome.error is not None:
            wanted[:] = -1  # so that processes where nothing failed stop, too
        capacity = self._worker.state.capacity  # only `set_capacity` changes it
        return ask(self.iteration, wanted, capacity, gather)

    def _do_agree(self, question: Question) -> bool:
        try:
            check_agreement(question)
        except DigestMismatch as error:
            self._fail("agreement", (), error)
            self._error = error
            return False
        return True

    def _take(
        self, outcome: Outcome, params: Any, tables: PlacementTables
    ) -> tuple[Any, PlacementTables]:
        """What was decided will go on its way."""
        epoch, update = self._epoch, outcome.update
        self._send()  # what was taken before it
        if epoch != self._epoch:
            return params, tables
        if outcome.error is not None:
            self._fail(outcome.stage, (), outcome.error, told=True)
        elif update is not None:
            # Rows are read from slots as they will be: what comes before in a layer goes first.
            while self._flights.touch(update.decision.layers):
                params, tables = self._flip(params, tables)
            if epoch == self._epoch:
                self._leaving = update, params, tables
        return params, tables

    def _send(self) -> None:
        """What leaves goes on its way."""
        if self._leaving is None:
            return
        (update, params, tables), self._leaving = self._leaving, None
        try:
            due = self.iteration + self.config.moving_iterations
            self._flights.send(update, params, tables, due)
        except Exception as error:
            self._fail("staging", update.decision.layers, error)

    def _fail(self, stage: str, layers, error: Exception, told: bool = False) -> None:
        """Tell of it, and plan from the placement that stays in force."""
        self.failures += 1
        if not told:
            self._tell(failure(self.served, self.iteration, stage, layers, error))
        if self.config.stop_on_failure:
            self._error = BalancerError(
                f"iteration {self.iteration}: {stage} failed: {type(error).__name__}: {error}. "
                "The old placement is in force"
            )
            self._error.__cause__ = error
        self._start_anew(self._flights.table)

    def _start_anew(self, table: np.ndarray) -> None:
        """Drop what was decided and is not in force; the worker plans from `table`."""
        self._epoch += 1
        self._leaving = None
        self._flights.restart(table)
        self._thread.submit(self._worker.restart, table)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
