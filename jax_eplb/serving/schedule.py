"""Which requests sit where: seats on ranks, batches of prompts, and the run's figures."""

import collections
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from jax_eplb.serving.request import Request

_SHORTEST_BUCKET = 16


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

    @property
    def used(self) -> np.ndarray:
        """bool[P, rows]: the rows with a sequence."""
        return self.owners >= 0

    @property
    def written(self) -> np.ndarray:
        """int32[P, rows]: the position of the token that the step writes."""
        return self.positions + self.lengths


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
        shape = num_ranks, seats_per_rank
        self._seated = np.full(shape, -1)  # the request on each seat; -1: none
        self._positions = np.zeros(shape, np.int32)  # of the token that its next step reads
        self._seeds = np.array([request.seed for request in requests], np.int32)
        # The position of the last token, which is written, and never read.
        self._last = np.array([len(r.prompt) + r.output_length - 1 for r in requests])
        self._rows = prompt_rows
        self._admitted: dict[int, float] = {}  # by request, by the clock
        self.latencies: dict[int, float] = {}  # seconds, of the finished requests

    @property
    def done(self) -> bool:
        return not self._waiting and self._is_empty()

    def next_step(self) -> StepPlan:
        free = (self._seated < 0).sum(axis=1)
        room = np.minimum(free, self._rows).sum()
        wanted = min(len(free) * self._rows, len(self._waiting))
        if self._waiting and (room >= wanted or self._is_empty()):
            return self._admit(free)
        return self._continue()

    def finish(self, plan: StepPlan) -> list[int]:
        """The requests that a completed step was the last of."""
        now, requests = time.perf_counter(), plan.owners[plan.used]
        finished = requests[plan.written[plan.used] == self._last[requests]].tolist()
        for request in finished:
            self.latencies[request] = now - self._admitted[request]
        return finished

    def _admit(self, free: np.ndarray) -> StepPlan:
        chosen: list[list[int]] = [[] for _ in free]
        while self._waiting:
            open_ranks = [r for r in range(len(free)) if free[r] and len(chosen[r]) < self._rows]
            if not open_ranks:
                break
            rank = max(open_ranks, key=lambda r: free[r])
            chosen[rank].append(self._waiting.popleft())
            free[rank] -= 1
        longest = max(len(self.requests[i].prompt) for row in chosen for i in row)
        width = max(_SHORTEST_BUCKET, 1 << (longest - 1).bit_length())
        shape = len(free), self._rows
        prompts = np.zeros((*shape, width), np.int32)
        lengths, seats = np.zeros((2, *shape), np.int32)
        owners = np.full(shape, -1)
        now = time.perf_counter()
        for rank, indices in enumerate(chosen):
            free_seats = np.flatnonzero(self._seated[rank] < 0)
            for row, (index, seat) in enumerate(zip(indices, free_seats, strict=False)):
                prompt = self.requests[index].prompt
                prompts[rank, row, : len(prompt)] = prompt
                lengths[rank, row], seats[rank, row] = len(prompt), seat
                owners[rank, row] = self._seated[rank, seat] = index
                self._positions[rank, seat] = len(prompt)
                self._admitted[index] = now
        self._leave()  # those whose one token this step writes
        return self._plan(owners, seats, np.zeros_like(lengths), lengths, prompts)

    def _continue(self) -> StepPlan:
        owners = self._seated.copy()
        lengths = (owners >= 0).astype(np.int32)
        seats = np.arange(owners.shape[1], dtype=np.int32) * lengths
        plan = self._plan(owners, seats, self._positions * lengths, lengths)
        self._positions += lengths
        self._leave()
        return plan

    def _leave(self) -> None:
        """Free the seats of sequences that have no token left to read."""
        self._seated[(self._seated >= 0) & (self._positions == self._last[self._seated])] = -1

    def _is_empty(self) -> bool:
        return not (self._seated >= 0).any()

    def _plan(self, owners, seats, positions, lengths, prompts=None) -> StepPlan:
        seeds = np.where(owners >= 0, self._seeds[owners], 0)
        return StepPlan(prompts, positions, lengths, seats, seeds, owners)


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
