"""Which requests sit where: seats on ranks, batches of prompts, and the run's figures."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from jax_eplb.serving.request import Request

_SHORTEST_BUCKET = 16


@dataclasses.dataclass
class _Seated:
    """A request on a seat of a rank."""

    index: int  # of the request
    position: int  # of the token that the next step reads


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step's rows, [P, rows]: what each rank's sequences read, and whose they are."""

    prompts: np.ndarray | None  # int32[P, rows, T]; None: each seat's last token
    positions: np.ndarray  # int32[P, rows], of the first token
    lengths: np.ndarray  # int32[P, rows]; 0: no sequence
    seats: np.ndarray  # int32[P, rows]
    seeds: np.ndarray  # int32[P, rows]
    owners: np.ndarray  # int64[P, rows], index of the request; -1: none

    @property
    def width(self) -> int:
        """T: tokens of a row, padding included."""
        return 1 if self.prompts is None else self.prompts.shape[-1]

    def rows(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """For each row with a sequence: its place, its request, and what is written when done."""
        for rank, row in zip(*np.nonzero(self.owners >= 0), strict=True):
            written = self.positions[rank, row] + self.lengths[rank, row]
            yield (int(rank), int(row)), int(self.owners[rank, row]), int(written)


class Schedule:
    """Seats requests on ranks and says what the next step runs.

    Prompts go first as soon as a full batch of them finds seats; otherwise every seated sequence
    writes one token. Requests are seated in order, on the ranks with most free seats, so that the
    same requests give the same steps whatever the placement.
    """

    def __init__(
        self, requests: Sequence[Request], *, num_ranks: int, seats_per_rank: int, prompt_rows: int
    ):
        self.requests = requests
        self._waiting = collections.deque(range(len(requests)))
        self._seats: list[list[_Seated | None]] = [
            [None] * seats_per_rank for _ in range(num_ranks)
        ]
        self._rows = prompt_rows
        self._admitted: dict[int, float] = {}  # by request, by the clock
        self.latencies: dict[int, float] = {}  # seconds, of the finished requests

    @property
    def done(self) -> bool:
        return not self._waiting and not self._num_seated()

    def next_step(self) -> StepPlan:
        free = [row.count(None) for row in self._seats]
        room = sum(min(n, self._rows) for n in free)
        wanted = min(len(self._seats) * self._rows, len(self._waiting))
        if self._waiting and (room >= wanted or not self._num_seated()):
            return self._admit(free)
        return self._continue()

    def finish(self, plan: StepPlan) -> list[int]:
        """The requests that a completed step was the last of."""
        now, finished = time.perf_counter(), []
        for _, request, written in plan.rows():
            end = len(self.requests[request].prompt) + self.requests[request].output_length
            if written == end - 1:  # the last token is never read
                self.latencies[request] = now - self._admitted[request]
                finished.append(request)
        return finished

    def _num_seated(self) -> int:
        return sum(seated is not None for row in self._seats for seated in row)

    def _admit(self, free: list[int]) -> StepPlan:
        chosen: list[list[int]] = [[] for _ in self._seats]
        while self._waiting:
            open_ranks = [r for r in range(len(free)) if free[r] and len(chosen[r]) < self._rows]
            if not open_ranks:
                break
            rank = max(open_ranks, key=lambda r: free[r])
            chosen[rank].append(self._waiting.popleft())
            free[rank] -= 1
        longest = max(len(self.requests[i].prompt) for row in chosen for i in row)
        width = max(_SHORTEST_BUCKET, 1 << (longest - 1).bit_length())
        plan = _empty_plan((len(self._seats), self._rows), width)
        now = time.perf_counter()
        for rank, indices in enumerate(chosen):
            for row, index in enumerate(indices):
                request = self.requests[index]
                seat = self._seats[rank].index(None)
                length = len(request.prompt)
                _fill(plan, rank, row, index, request.seed, seat, position=0, length=length)
                if plan.prompts is not None:
                    plan.prompts[rank, row, :length] = request.prompt
                self._admitted[index] = now
                self._seats[rank][seat] = _Seated(index, length)
        for seats in self._seats:  # one token is written by the step itself
            for seat, seated in enumerate(seats):
                if seated is not None and self.requests[seated.index].output_length == 1:
                    seats[seat] = None
        return plan

    def _continue(self) -> StepPlan:
        plan = _empty_plan((len(self._seats), len(self._seats[0])), None)
        for rank, seats in enumerate(self._seats):
            for seat, seated in enumerate(seats):
                if seated is None:
                    continue
                request = self.requests[seated.index]
                _fill(plan, rank, seat, seated.index, request.seed, seat, seated.position, 1)
                seated.position += 1
                if seated.position == len(request.prompt) + request.output_length - 1:
                    seats[seat] = None
        return plan


def _empty_plan(shape: tuple[int, int], width: int | None) -> StepPlan:
    prompts = None if width is None else np.zeros((*shape, width), np.int32)
    positions, lengths, seats, seeds = (np.zeros(shape, np.int32) for _ in range(4))
    return StepPlan(prompts, positions, lengths, seats, seeds, np.full(shape, -1))


def _fill(plan: StepPlan, rank, row, index, seed, seat, position, length) -> None:
    plan.owners[rank, row] = index
    plan.seeds[rank, row] = seed
    plan.seats[rank, row] = seat
    plan.positions[rank, row] = position
    plan.lengths[rank, row] = length


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What a run took, by the clock; latencies from a request's admission to its last token."""

    requests: int
    output_tokens: int
    iterations: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    latency_mean: float  # seconds
    latency_p50: float
    latency_p99: float

    @classmethod
    def of(cls, schedule: Schedule, iterations: int, seconds: float) -> "Throughput":
        latencies = np.array(list(schedule.latencies.values()))
        tokens = sum(request.output_length for request in schedule.requests)
        count = len(schedule.requests)
        return cls(
            requests=count,
            output_tokens=tokens,
            iterations=iterations,
            seconds=seconds,
            requests_per_second=count / seconds,
            output_tokens_per_second=tokens / seconds,
            latency_mean=float(latencies.mean()),
            latency_p50=float(np.quantile(latencies, 0.5)),
            latency_p99=float(np.quantile(latencies, 0.99)),
        )
