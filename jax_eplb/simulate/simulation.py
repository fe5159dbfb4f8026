"""Simulation: what policies would have gained on a recording.

Axes: W windows, L layers, E experts, S slots, P ranks. Windows are scored from number `history` on;
those before are only known.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_eplb import metrics
from jax_eplb.load import Recording
from jax_eplb.placement import Placement, check_sizes, fewest_slots
from jax_eplb.planner import lower_bound, plan
from jax_eplb.report import rank_tokens
from jax_eplb.simulate.costs import Costs
from jax_eplb.simulate.policy import Policy
from jax_eplb.simulate.replay import Sizes, follow, score, settings_of, stay

# Policies replayed by one program.
_TOGETHER = 8
# Consecutive parts of the scored windows, each left out once, for the error of the gain.
_PARTS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy would have done in the scored windows, beside doing nothing."""

    policy: Policy
    num_slots: int
    num_ranks: int
    replica_choice: str
    imbalance: np.ndarray  # float32[W, L]
    moves: np.ndarray  # int32[W, L]: slots that changed before the window
    step_seconds: np.ndarray  # float64[W], one step in each window
    move_seconds: np.ndarray  # float64[W], for all of the window's steps together
    unbalanced_imbalance: np.ndarray  # float64[W, L], of the initial layout in the fewest slots
    unbalanced_seconds: np.ndarray  # float64[W], one step under it
    steps_per_window: int

    @property
    def seconds(self) -> np.ndarray:
        """With the moves, float64[W], for all steps of a window."""
        return self.steps_per_window * self.step_seconds + self.move_seconds

    @property
    def gain(self) -> float:
        """Throughput over that without balancing, minus 1."""
        return float(self._without.sum() / self.seconds.sum()) - 1

    @property
    def gain_without_moves(self) -> float:
        """The same if moves took no time."""
        steps = self.steps_per_window * self.step_seconds.sum()
        return float(self._without.sum() / steps) - 1

    @property
    def gain_error(self) -> float:
        """Standard error of the gain; NaN where fewer than three windows were scored.

        By leaving out one of up to ten consecutive parts at a time (jackknife): windows near each
        other resemble each other, so they do not count as independent.
        """
        number = min(_PARTS, len(self.seconds))
        if number < 3:
            return float("nan")
        parts = np.array_split(np.arange(len(self.seconds)), number)
        without, seconds = (
            np.array([values[part].sum() for part in parts])
            for values in (self._without, self.seconds)
        )
        left = (without.sum() - without) / (seconds.sum() - seconds)
        return float(np.sqrt((number - 1) / number * ((left - left.mean()) ** 2).sum()))

    @property
    def move_share(self) -> float:
        """The part of the time that moves take."""
        return float(self.move_seconds.sum() / self.seconds.sum())

    @property
    def mean_imbalance(self) -> float:
        return float(self.imbalance.mean(dtype=np.float64))

    @property
    def _without(self) -> np.ndarray:
        return self.steps_per_window * self.unbalanced_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "policy": self.policy.describe(),
            **dataclasses.asdict(self.policy),
            "num_slots": self.num_slots,
            "ranks": self.num_ranks,
            "replica_choice": self.replica_choice,
            "imbalance": self.mean_imbalance,
            "gain": self.gain,
            "gain_error": None if np.isnan(self.gain_error) else self.gain_error,
            "move_share": self.move_share,
            "moves_per_window_and_layer": float(self.moves.mean()),
        }


def simulate(
    recording: Recording,
    policy: Policy,
    *,
    num_ranks: int,
    num_slots: int | None = None,
    replica_choice: str = "even",
    history: int | None = None,
    costs: Costs | None = None,
    steps_per_window: int = 1,
    tokens_per_step: float | None = None,
    effort: str = "fast",
) -> Outcome:
    """Replay a recording: plan on the windows before each window, score on the window itself.

    num_slots: default: the fewest, one for each expert.
    history: windows that are known before scoring begins, and that the first plan is made from;
        default: a quarter.
    steps_per_window: how many iterations of the model a window stands for, each with its counts.
    tokens_per_step: tokens of an iteration, where not those of a window; the imbalance stays.
    effort: of the planner. The first plan is `jax-eplb plan`'s, later ones are the balancer's.

    Raises ValueError where there are fewer than two windows, or none with tokens to score.

    >>> counts = np.array([[[9, 1, 1, 1]], [[8, 2, 1, 1]], [[9, 1, 1, 1]]])
    >>> recording = Recording(counts, num_experts=4, experts_per_token=1)
    >>> outcome = simulate(recording, Policy(), num_ranks=2, num_slots=6)
    >>> outcome.imbalance.round(3).tolist()
    [[0.0], [0.0]]
    """
    (outcome,) = sweep(
        recording,
        [policy],
        num_ranks=[num_ranks],
        num_slots=[num_slots],
        replica_choices=[replica_choice],
        history=history,
        costs=costs,
        steps_per_window=steps_per_window,
        tokens_per_step=tokens_per_step,
        effort=effort,
        plan_split=replica_choice,
    )
    return outcome


def sweep(
    recording: Recording,
    policies: Sequence[Policy],
    *,
    num_ranks: Sequence[int],
    num_slots: Sequence[int | None],
    replica_choices: Sequence[str] = ("even",),
    history: int | None = None,
    costs: Costs | None = None,
    steps_per_window: int = 1,
    tokens_per_step: float | None = None,
    effort: str = "fast",
    plan_split: str = "even",
) -> Iterator[Outcome]:
    """`simulate` for all of these together, size after size.

    Policies of one size are replayed side by side by one program, which is compiled once for each
    size. All are planned for `plan_split` once, whatever the replica choices: the search for the
    even split takes a hundredth of the other's time, and its plans serve both.
    """
    counts = recording.expert_counts()
    history = check_history(counts, history)
    costs = costs or Costs()
    for choice in (*replica_choices, plan_split):
        if choice not in ("even", "balanced"):
            raise ValueError(f"replica choice {choice!r} must be 'even' or 'balanced'")
    choices = counts[history:].sum(axis=-1)  # [W, L]
    if tokens_per_step is not None:
        choices = choices * (tokens_per_step * recording.experts_per_token / choices.mean())
    for ranks, slots in itertools.product(num_ranks, num_slots):
        fewest = fewest_slots(recording.num_experts, ranks)
        slots = slots or fewest
        check_sizes(recording.num_experts, slots, ranks)
        layout = _initial(recording, fewest, ranks)
        none = metrics.imbalance(rank_tokens(recording, placement=layout)[history:])
        sizes = Sizes(slots, ranks, plan_split, effort)
        for choice, policy, replayed in _replay(
            recording, history, policies, replica_choices, sizes
        ):
            yield Outcome(
                policy=policy,
                num_slots=slots,
                num_ranks=ranks,
                replica_choice=choice,
                imbalance=replayed.imbalance,
                moves=replayed.moves,
                step_seconds=costs.step_seconds(
                    replayed.imbalance, choices, num_ranks=ranks, num_slots=slots
                ),
                move_seconds=costs.move_seconds(replayed.received),
                unbalanced_imbalance=none,
                unbalanced_seconds=costs.step_seconds(
                    none, choices, num_ranks=ranks, num_slots=fewest
                ),
                steps_per_window=steps_per_window,
            )


def bound_of(
    recording: Recording, *, num_ranks: int, num_slots: int, history: int, replica_choice: str
) -> float:
    """An imbalance that no policy, not even an oracle, has less of: mean of windows and layers."""
    counts = recording.expert_counts()[history:]
    # Each window as a layer of its own: a placement may be in force for that one alone.
    each = jnp.asarray(counts.reshape(-1, counts.shape[-1]), jnp.float32)
    bounds = lower_bound(
        each, num_slots=num_slots, num_ranks=num_ranks, split=replica_choice, simple=True
    )
    return float(np.asarray(bounds, np.float64).mean())


def check_history(counts: np.ndarray, history: int | None) -> int:
    """The number of windows known beforehand; ValueError where none is left to score."""
    windows = len(counts)
    if windows < 2:
        raise ValueError(
            "the recording has one window: one is needed to plan from, and another to score on; "
            "record more iterations, or divide the tokens (recommend does)"
        )
    if history is None:
        history = max(windows // 4, 1)
    if not 1 <= history < windows:
        raise ValueError(f"history is {history} of {windows} windows; use 1 to {windows - 1}")
    if not counts[history:].any():
        raise ValueError(f"no tokens in the windows from number {history} on: nothing to score")
    return history


def _initial(recording: Recording, num_slots: int, num_ranks: int) -> Placement:
    return Placement.default(
        num_experts=recording.num_experts,
        num_ranks=num_ranks,
        num_slots=num_slots,
        layer_ids=recording.layer_ids,
    )


class _Replayed(NamedTuple):
    """Of the scored windows."""

    imbalance: np.ndarray  # float32[W, L]
    moves: np.ndarray  # int32[W, L]
    received: np.ndarray  # int32[W]


def _replay(
    recording: Recording,
    history: int,
    policies: Sequence[Policy],
    replica_choices: Sequence[str],
    sizes: Sizes,
) -> Iterator[tuple[str, Policy, _Replayed]]:
    """All policies for one size, and what each replica choice makes of their placements."""
    counts = recording.expert_counts()
    loads = jnp.asarray(counts, jnp.float32)
    num_slots, num_ranks = sizes.num_slots, sizes.num_ranks
    initial = planned = _initial(recording, num_slots, num_ranks).slot_to_expert
    if any(policy.planned for policy in policies):
        planned = plan(
            counts[:history], num_slots, num_ranks, split=sizes.split, effort=sizes.effort
        ).placement.slot_to_expert
    # Those that plan at the same times side by side: where one plans, all do.
    order = sorted(policies, key=lambda policy: policy.interval or len(counts))
    # Always as many under the even split, so that one program does for all.
    together = _TOGETHER if sizes.split == "even" else min(_TOGETHER, len(order))
    for start in range(0, len(order), together):
        some = order[start : start + together]
        filled = some + some[-1:] * (together - len(some))
        first = jnp.stack([planned if policy.planned else initial for policy in filled])
        if any(policy.follows for policy in some):
            settings = settings_of(filled, len(counts), num_slots)
            found = follow(loads, jnp.int32(history), first, settings, sizes)
        else:
            found = stay(first, len(counts))
        moves, received = np.asarray(found.moves), np.asarray(found.received)
        for choice in replica_choices:
            imbalance = np.asarray(
                score(loads[history:], found.tables[:, history:], num_ranks=num_ranks, split=choice)
            )
            for i, policy in enumerate(some):
                yield (
                    choice,
                    policy,
                    _Replayed(imbalance[i], moves[i, history:], received[i, history:]),
                )
