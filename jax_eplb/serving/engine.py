"""The engine: a decoder on a mesh, its cache, and the loop that feeds it."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jax_eplb.load import Recorder
from jax_eplb.mesh import lay_out
from jax_eplb.models import Cache
from jax_eplb.models.weights import SavedDecoder, StoredDecoder
from jax_eplb.moving import RebalanceError, find_banks, prepare_moves, rebalance
from jax_eplb.online import Balancer, BalancerConfig, Listener
from jax_eplb.placement import Placement
from jax_eplb.routing import split_of
from jax_eplb.serving.calibrate import seconds_per_token
from jax_eplb.serving.request import Request
from jax_eplb.serving.schedule import Schedule, StepPlan, Throughput
from jax_eplb.serving.step import AXIS, Rows, State, Statics, run_step
from jax_eplb.tables import PlacementTables

# Steps in flight: one computes while the next is being handed over.
_AHEAD = 2
# Of a rank, moved at once when the placement changes: the more, the more memory that takes.
_SLOTS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """Sizes of the loop; batches are counted in sequences of one rank."""

    max_batch_size: int = 8
    max_prompts_per_step: int | None = None  # None: half of max_batch_size
    max_length: int = 256  # positions of a sequence in the cache
    moe_max_num_tokens: int | None = None
    replica_choice: str = "even"  # how tokens are divided among replicas; as in MoEConfig
    temperature: float = 0.0  # 0: the likeliest token

    def __post_init__(self):
        for name in ("max_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; use a number of 0 or more")
        if not 1 <= self.prompt_rows <= self.max_batch_size:
            raise ValueError(
                f"max_prompts_per_step is {self.max_prompts_per_step}; it must lie between 1 and "
                f"max_batch_size, {self.max_batch_size}"
            )

    @property
    def split(self) -> str:
        """What plans are made for: "balanced" where replicas are chosen so, else "even"."""
        return split_of(self.replica_choice)

    @property
    def prompt_rows(self) -> int:
        if self.max_prompts_per_step is None:
            return -(-self.max_batch_size // 2)
        return self.max_prompts_per_step


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What each request got, in order, and how fast."""

    outputs: list[np.ndarray]  # int32[output_length] each
    throughput: Throughput


class Engine:
    """Serves requests with one model, one mesh and one placement at a time.

    With a `balancer`, which is told of every iteration that is served, the placement follows the
    load; `listeners` hear what it does, and `kept` is the load that it goes on from. Where replicas
    are chosen by `balanced`, plans are made for that.
    """

    def __init__(
        self,
        saved: SavedDecoder | StoredDecoder,
        *,
        mesh: Mesh,
        placement: Placement,
        serving: ServingConfig | None = None,
        dtype=jnp.float32,
        balancer: BalancerConfig | None = None,
        listeners: Sequence[Listener] = (),
        kept: Mapping[str, np.ndarray] | None = None,
    ):
        config, serving = saved.config, serving or ServingConfig()
        if AXIS not in mesh.shape:
            raise ValueError(f"the mesh has the axes {mesh.axis_names}; one must be {AXIS!r}")
        self.config, self.mesh, self.serving, self._dtype = config, mesh, serving, dtype
        self._check_placement(placement)
        self.moe = config.moe(
            num_slots=placement.num_slots,
            num_ranks=placement.num_ranks,
            moe_max_num_tokens=serving.moe_max_num_tokens,
            replica_choice=serving.replica_choice,
        )
        self._params = saved.on_mesh(placement, mesh, AXIS, dtype)
        self.placement, self._tables = placement, self._tables_of(placement)
        banks = find_banks(self._params, num_slots=placement.num_slots, axis_name=AXIS)
        prepare_moves(self._params, _SLOTS_AT_ONCE, banks=banks)
        temperature = np.asarray(serving.temperature, np.float32)
        self._temperature = lay_out(temperature, NamedSharding(mesh, P()))
        self._state = self._empty_state()
        self._statics = Statics(config, self.moe, mesh)
        self.balancer = None
        if balancer is not None:
            self.balancer = Balancer(
                placement, balancer, split=serving.split, listeners=listeners, kept=kept
            )
            per_token = None
            if balancer.horizon is not None and balancer.seconds_per_token is None:
                per_token = seconds_per_token(self._params.sparse.moe.experts, self.moe)
            self.balancer.prepare(self._params, seconds_per_token=per_token, banks=banks)

    def use_placement(self, placement: Placement) -> None:
        """Put the experts where the placement says; same sizes, so nothing is compiled again.

        Only experts whose slots change move, from device to device, in place. Raises ValueError
        where it is for another model or mesh, or has another number of slots, and RebalanceError
        where moving failed: the placement in force then stays so.
        """
        self._check_placement(placement)
        if placement.num_slots != self.moe.num_slots:
            raise ValueError(
                f"the placement has {placement.num_slots} slots, this engine "
                f"{self.moe.num_slots}; plan for {self.moe.num_slots}, or make another engine"
            )
        tables = self._tables_of(placement)  # first, as `rebalance` uses the old weights up
        try:
            self._params = rebalance(
                self._params,
                self.placement,
                placement,
                slots_at_once=_SLOTS_AT_ONCE,
                axis_name=AXIS,
            )
        except RebalanceError as error:
            self._params = error.params
            raise
        self.placement, self._tables = placement, tables
        if self.balancer is not None:
            self.balancer.reset(placement)

    def _tables_of(self, placement: Placement) -> PlacementTables:
        tables = placement.tables(with_leveling=self.moe.needs_leveling)
        return lay_out(jax.tree.map(np.asarray, tables), NamedSharding(self.mesh, P()))

    def recorder(self, start: int = 0, stop: int | None = None) -> Recorder:
        """A recorder for this model, and for its placement unless that may change."""
        changes = self.balancer is not None and self.balancer.config.layer_updates_per_iter > 0
        return Recorder(
            num_experts=self.config.num_experts,
            experts_per_token=self.config.experts_per_token,
            layer_ids=self.config.moe_layer_ids,
            start=start,
            stop=stop,
            placement=None if changes else self.placement,
        )

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compile every step that serving these requests will take, without serving any.

        Each is run once with no sequence in it, which computes and counts nothing.
        """
        self._check(requests)
        schedule, seen = self._schedule(requests), set()
        while not schedule.done:
            plan = schedule.next_step()
            kind = (plan.prompts is None, plan.width)
            if kind not in seen:
                seen.add(kind)
                empty = dataclasses.replace(plan, lengths=np.zeros_like(plan.lengths))
                jax.block_until_ready(self._launch(empty))

    def run(
        self,
        requests: Sequence[Request],
        *,
        recorder: Recorder | None = None,
        on_progress: Callable[[int], None] = lambda finished: None,
        on_finished: Callable[[int, np.ndarray], None] = lambda request, output: None,
    ) -> RunResult:
        """Serve all requests.

        `on_progress` hears how many are finished after each step, `on_finished` of each of them by
        its index, with its tokens.

        The loop stays a step ahead of the device and reads tokens when they are done; a step
        itself never waits for the host.
        """
        self._check(requests)
        schedule = self._schedule(requests)
        # All outputs side by side, so that a step's tokens are written at once.
        lengths = np.array([request.output_length for request in requests])
        prompts = np.array([len(request.prompt) for request in requests])
        ends = lengths.cumsum()
        written = np.zeros(ends[-1], np.int32)
        outputs = np.split(written, ends[:-1])
        origins = ends - lengths - prompts  # where a request's position 0 would be
        flying: collections.deque[tuple[StepPlan, Array]] = collections.deque()
        begun, iterations = time.perf_counter(), 0

        def land():
            plan, tokens = flying.popleft()
            next_tokens = np.asarray(tokens).reshape(plan.owners.shape)
            places = origins[plan.owners[plan.used]] + plan.written[plan.used]
            written[places] = next_tokens[plan.used]
            for request in schedule.finish(plan):
                on_finished(request, outputs[request])
            on_progress(len(schedule.latencies))

        while not schedule.done:
            plan = schedule.next_step()
            if self.balancer is not None:
                self._params, self._tables = self.balancer.between_steps(self._params, self._tables)
                self.placement = self.balancer.placement
            tokens, expert_tokens, rank_tokens = self._launch(plan)
            if self.balancer is not None:
                self.balancer.after_step(expert_tokens, rank_tokens)
            if recorder is not None:
                recorder.record(expert_tokens, rank_tokens)
            flying.append((plan, tokens))
            iterations += 1
            if len(flying) >= _AHEAD:
                land()
        while flying:
            land()
        seconds = time.perf_counter() - begun
        return RunResult(outputs, Throughput.of(schedule, iterations, seconds))

    def _check_placement(self, placement: Placement) -> None:
        config, num_ranks = self.config, self.mesh.shape[AXIS]
        if placement.layer_ids != config.moe_layer_ids:
            raise ValueError(
                f"the placement's layers are {placement.layer_ids}, the model's MoE layers "
                f"{config.moe_layer_ids}; use a placement of this model"
            )
        if placement.num_experts != config.num_experts:
            raise ValueError(
                f"the placement is for {placement.num_experts} experts, the model has "
                f"{config.num_experts}; use a placement of this model"
            )
        if placement.num_ranks != num_ranks:
            raise ValueError(
                f"the placement is for {placement.num_ranks} ranks, the mesh has {num_ranks} "
                f"devices; plan for {num_ranks} ranks"
            )

    def _schedule(self, requests: Sequence[Request]) -> Schedule:
        return Schedule(
            requests,
            num_ranks=self.moe.num_ranks,
            seats_per_rank=self.serving.max_batch_size,
            prompt_rows=self.serving.prompt_rows,
        )

    def _check(self, requests: Sequence[Request]) -> None:
        if not requests:
            raise ValueError("there is no request to serve")
        limit = min(self.serving.max_length, self.config.max_length)
        for index, request in enumerate(requests):
            length = len(request.prompt) + request.output_length
            if length > limit:
                raise ValueError(
                    f"request {index}: {len(request.prompt)} prompt and {request.output_length} "
                    f"output tokens exceed max_length {limit}"
                )
            ids = request.prompt
            unknown = (ids < 0) | (ids >= self.config.vocab_size)
            if unknown.any():
                raise ValueError(
                    f"request {index}: unknown token {ids[unknown.argmax()]}; this model's are "
                    f"0 to {self.config.vocab_size - 1}"
                )

    def _launch(self, plan: StepPlan):
        def put(x, *spec):
            return lay_out(x, NamedSharding(self.mesh, P(*spec, AXIS)))

        of_plan = [getattr(plan, name).reshape(-1) for name in Rows._fields]
        rows = put(np.stack(of_plan), None)  # together, as each array takes the host some time
        prompts = plan.prompts
        if prompts is not None:
            prompts = put(prompts.reshape(-1, prompts.shape[-1]))
        self._state, *seen = run_step(
            self._statics,
            self._params,
            self._tables,
            self._state,
            prompts,
            rows,
            self._temperature,
        )
        return seen

    def _empty_state(self) -> State:
        config, serving = self.config, self.serving
        seats = serving.max_batch_size * self.moe.num_ranks
        shape = (config.num_layers, seats, serving.max_length, config.num_heads, config.head_dim)
        by_seat = NamedSharding(self.mesh, P(None, AXIS))
        make = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=by_seat)
        last = lay_out(np.zeros(seats, np.int32), NamedSharding(self.mesh, P(AXIS)))
        return State(Cache(make(), make()), last)
