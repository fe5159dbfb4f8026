"""The balancer's work off the step's path: reads counts, decides, and makes ready what follows.

Its methods run one after the other, in a thread of their own. Axes: L layers, K layers of a look,
E experts, S slots, P ranks.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_eplb.moving import Moves, find_moves
from jax_eplb.online.capacity import checked_capacity, lost_after
from jax_eplb.online.config import BalancerConfig
from jax_eplb.online.decide import Decision, Served, decide, prepare_decisions
from jax_eplb.online.effect import Effects
from jax_eplb.online.events import Event, Failure, LayerUpdate, Look, StepSeen
from jax_eplb.online.parts import in_parts
from jax_eplb.online.state import (
    choose_layers,
    initial_state,
    looks_after,
    observe,
    with_capacity,
)
from jax_eplb.online.worth import Costs
from jax_eplb.placement import Placement
from jax_eplb.tables import PlacementTables, derive_tables

# Rows of a rank that one program moves. More are moved by several, since each size is compiled.
SLOTS_AT_ONCE = 4
# Updates whose time in flight is remembered; those not told of yet are far fewer.
_FLIGHTS_KEPT = 1000


class Update(NamedTuple):
    """What a decision needs to be carried out."""

    decision: Decision
    moves: list[Moves]  # in parts
    tables: PlacementTables  # numpy, of the layers that change


class Outcome(NamedTuple):
    """What one iteration's counts led to."""

    update: Update | None = None
    error: Exception | None = None
    stage: str = ""  # that failed


class Worker:
    """Keeps the state, and turns an iteration's counts into what there is to do."""

    def __init__(
        self,
        placement: Placement,
        config: BalancerConfig,
        served: Served,
        *,
        ranks_per_node: int | None,
        iterations_to_leave: int,
        tell: Callable[[Event], None],
    ):
        self.config, self.served, self._tell = config, served, tell
        self.state = initial_state(placement, config)
        self.costs: Costs | None = None
        self._lost: frozenset[int] = frozenset()  # ranks whose weights cannot be read
        self._slots_per_rank, self._ranks_per_node = placement.slots_per_rank, ranks_per_node
        self._iterations_to_leave = iterations_to_leave
        # K, or L where there are fewer layers.
        self._count = min(config.layer_updates_per_iter, placement.num_layers)
        self._effects = Effects(placement.num_layers)
        self._flights: collections.OrderedDict[int, float] = collections.OrderedDict()
        self._device = _cpu()

    def prepare(self, costs: Costs) -> None:
        """Compile what `work` runs."""
        self.costs = costs
        with self._on_cpu():
            prepare_decisions(self.state, self.config, self.served)
        self.derive(self.state.table[np.zeros(self._count, int)])

    def work(self, iteration: int, expert_tokens: Any, rank_tokens: Any) -> Outcome:
        """Read an iteration's counts, which may still be computed, and decide."""
        stage = "counts"
        try:
            by_rank = _read(rank_tokens).T
            counts = _read(expert_tokens).sum(axis=0)
            self.state = observe(self.state, counts, by_rank, self.config, self.served.layer_ids)
            self._hear(iteration, by_rank.sum(axis=1))
            if not looks_after(self.state.iteration, self.config):
                return Outcome()
            stage = "planning"
            with self._on_cpu():
                return Outcome(self._decide(iteration))
        except Exception as error:
            # On with the load as it was before, and the next layers.
            self.state = self.state._replace(iteration=iteration + 1)
            if looks_after(iteration + 1, self.config):
                _, self.state = choose_layers(self.state, self.config)
            self._tell(failure(self.served, iteration, stage, (), error))
            return Outcome(error=error, stage=stage)

    def restart(self, table: np.ndarray) -> None:
        """Plan from this placement from now on; what was decided since will not come."""
        self.state = self.state._replace(table=table)
        self._effects.forget()

    def set_capacity(
        self,
        capacity: Sequence[float],
        lost_ranks: Collection[int],
        in_force: Placement,
        has_host: bool,
    ) -> None:
        """Plan for these speeds from now on.

        Raises the errors of `checked_capacity` and `lost_after`, and then changes nothing.
        """
        with self._on_cpu():
            values = checked_capacity(capacity, in_force, lost_ranks)
        self._lost = lost_after(self.state, values, self._lost, lost_ranks, in_force, has_host)
        self.state = with_capacity(self.state, values)

    def close_effects(self) -> None:
        """Tell of the updates whose effect was not measured in full."""
        for update in self._effects.close():
            self._tell_of(update)

    def note_flight(self, decided_at: int, seconds: float) -> None:
        """How long what was decided then was on its way; called before it is measured."""
        self._flights[decided_at] = seconds
        if len(self._flights) > _FLIGHTS_KEPT:
            self._flights.popitem(last=False)

    def derive(self, table: np.ndarray) -> PlacementTables:
        """The tables of some layers' placements, in numpy, for the ranks' speeds."""
        with self._on_cpu():
            derived = derive_tables(
                table,
                num_experts=self.served.num_experts,
                num_ranks=self.served.num_ranks,
                with_leveling=self.served.split == "balanced",
                capacity=self.state.capacity,
            )
        return jax.tree.map(np.asarray, derived)

    def _hear(self, iteration: int, tokens: np.ndarray) -> None:
        imbalance = self.state.imbalance
        told = tuple(imbalance.tolist())
        self._tell(StepSeen(iteration, told, self.served.layer_ids, int(tokens.sum())))
        for update in self._effects.measure(iteration, imbalance, tokens):
            self._tell_of(update)

    def _decide(self, iteration: int) -> Update | None:
        begun, old = time.perf_counter(), self.state.table
        self.state, decision = decide(self.state, self.config, self.served, self.costs)
        if decision is None:
            return None
        update = self._update(decision, old, begun) if decision.layers.size else None
        ids, seconds = self.served.layer_ids, time.perf_counter() - begun
        looked_at, changed = (
            tuple(ids[i] for i in layers) for layers in (decision.looked_at, decision.layers)
        )
        self._tell(Look(iteration, looked_at, changed, seconds))
        return update

    def _update(self, decision: Decision, old: np.ndarray, begun: float) -> Update:
        layers = decision.layers
        moves = find_moves(
            old[layers],
            decision.rows,
            num_ranks=self.served.num_ranks,
            num_experts=self.served.num_experts,
            ranks_per_node=self._ranks_per_node,
            lost_ranks=self._lost,
        )
        moves = moves._replace(layer=layers[moves.layer].astype(np.int32))
        # Always K layers, so that one program does.
        filled = np.resize(decision.rows, (self._count, decision.rows.shape[1]))
        tables = PlacementTables(*(table[: layers.size] for table in self.derive(filled)))
        self._expect(decision, time.perf_counter() - begun)
        return Update(decision, in_parts(moves, self._slots_per_rank, SLOTS_AT_ONCE), tables)

    def _expect(self, decision: Decision, seconds: float) -> None:
        leaves = decision.iteration + self._iterations_to_leave
        self._effects.hasten(decision.layers.tolist(), leaves)
        slot_bytes = 0 if self.costs is None else self.costs.bytes_per_slot
        for i, layer in enumerate(decision.layers):
            update = LayerUpdate(
                step=leaves + self.config.moving_iterations,
                decided_at=decision.iteration,
                layer=self.served.layer_ids[layer],
                moves=int(decision.moves[i]),
                bytes=int(decision.moves[i]) * slot_bytes,
                imbalance_before=None,
                imbalance_after=None,
                planned_before=float(decision.imbalance_before[i]),
                imbalance_expected=float(decision.imbalance_expected[i]),
                seconds_saved=float(decision.seconds_saved[i]),
                seconds_to_move=float(decision.seconds_to_move[i]),
                seconds_to_plan=seconds,
                seconds_in_flight=0.0,
            )
            self._effects.expect(int(layer), update)

    def _tell_of(self, update: LayerUpdate) -> None:
        seconds = self._flights.get(update.decided_at, 0.0)
        self._tell(dataclasses.replace(update, seconds_in_flight=seconds))

    @contextlib.contextmanager
    def _on_cpu(self) -> Iterator[None]:
        """Plans run on the CPU where there is one: not between the steps of an accelerator."""
        with jax.default_device(self._device):
            yield


def failure(served: Served, step: int, stage: str, layers: Any, error: Exception) -> Failure:
    """The event of an error; `layers` are positions."""
    ids = tuple(served.layer_ids[i] for i in layers)
    return Failure(step, stage, ids, f"{type(error).__name__}: {error}")


def _read(array: Any) -> np.ndarray:
    """The array on the host, once it is computed."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        raise ValueError(
            f"counts of shape {array.shape} are spread over processes ({array.sharding}); let the "
            "step return them replicated"
        )
    return np.asarray(array)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[-1]
    except RuntimeError:
        return None  # JAX was told to leave the CPU out
