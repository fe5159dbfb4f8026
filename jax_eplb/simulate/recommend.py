"""Recommend: whether to balance, and how, from what a recording shows.

Axes: W windows, L layers, E experts, P ranks.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jax_eplb.load import Recording
from jax_eplb.placement import fewest_slots
from jax_eplb.simulate.costs import Costs
from jax_eplb.simulate.policy import STATIC, Policy, online
from jax_eplb.simulate.simulation import Outcome, check_history, simulate, sweep

REPLICA_CHOICES = ("even", "balanced")
# Spare slots, in ranks; windows between plans; what a window counts less with each that follows.
_SPARE = (0, 1, 2)
_INTERVALS = (1, 4, 16, 64)
_DECAYS = (0.5, 0.8, 0.95)
# Of two settings whose gains differ by no more than this part, the one with fewer slots is taken,
# then the one with fewer plans: what is best of many on one recording is so by luck, in part.
_TOLERANCE = 0.1
_MIN_GAIN = 0.05
# A gain counts as one where it is more than so many standard errors.
_ERRORS = 2.0
_PARTS_OF_ONE_WINDOW = 8


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What to do. Where `balance` is False the rest says what the best setting would have given."""

    balance: bool
    num_slots: int
    replan_every: int | None  # iterations; None: one plan, beforehand
    replica_choice: str
    expected_gain: float  # of throughput, moves paid for
    reason: str
    gain_error: float | None  # standard error; None where there are too few windows to say
    move_share: float  # part of the time spent on moves
    decay: float
    max_moves: int | None
    expected_gain_even: float | None  # of the best setting of the sweep with replica choice "even"
    imbalance_before: float
    imbalance_after: float
    least_tokens: float  # an iteration; below, reading weights takes as long as computing

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Advice:
    """A recommendation and what it rests on."""

    recommendation: Recommendation
    chosen: Outcome  # of the best setting, planned as it would be while serving
    outcomes: list[Outcome]  # of the sweep
    recording: Recording  # what was replayed: of one window, its parts
    history: int


def slots_to_try(num_experts: int, num_ranks: int) -> list[int]:
    """The fewest slots, and a spare one or two for each rank.

    >>> slots_to_try(32, 8)
    [32, 40, 48]
    """
    fewest = fewest_slots(num_experts, num_ranks)
    most = max(fewest, min(2 * fewest, num_experts * num_ranks))
    sizes = (fewest + spare * num_ranks for spare in _SPARE)
    return [size for size in sizes if size <= most]


def policies_to_try(
    num_ranks: int,
    scored: int,
    intervals: Sequence[int] | None = None,
    decays: Sequence[float] | None = None,
    max_moves: Sequence[int | None] | None = None,
) -> list[Policy]:
    """A static one, and all that these combine to; by default what so many windows can tell apart.

    >>> len(policies_to_try(8, scored=100)), len(policies_to_try(8, 100, decays=[0.9]))
    (19, 7)
    """
    if intervals is None:
        # One that plans less than twice is not told from a static one.
        intervals = [interval for interval in _INTERVALS if 2 * interval < scored]
    decays = _DECAYS if decays is None else decays
    limits = (max(num_ranks // 2, 1), None) if max_moves is None else max_moves
    following = itertools.product(decays, limits, intervals)
    return [STATIC, *itertools.starmap(online, following)]


def recommend(
    recording: Recording,
    *,
    num_ranks: int,
    replica_choices: Sequence[str] = REPLICA_CHOICES,
    num_slots: Sequence[int] | None = None,
    intervals: Sequence[int] | None = None,
    decays: Sequence[float] | None = None,
    max_moves: Sequence[int | None] | None = None,
    history: int | None = None,
    costs: Costs | None = None,
    steps_per_window: int = 1,
    tokens_per_step: float | None = None,
    min_gain: float = _MIN_GAIN,
    effort: str = "fast",
) -> Advice:
    """Sweep over slots, replica choices and policies; replay the best as it would be served.

    At its size, a static plan is replayed, too. What is not given is tried as `slots_to_try` and
    `policies_to_try` say; `intervals` are in windows, None among `max_moves` is no limit.

    A recording of one window holds no time: its tokens are divided at random into eight, and what
    changes with time cannot be seen. `min_gain`: a smaller gain is not worth it, for what the model
    of costs leaves out is as large. Raises ValueError as `simulate` does.
    """
    costs = costs or Costs()
    note = ""
    if len(recording.iterations) == 1:
        recording = divide_window(recording, _PARTS_OF_ONE_WINDOW)
        note = " The recording is one window, so it says nothing of change over time."
    counts = recording.expert_counts()
    history = check_history(counts, history)
    policies = policies_to_try(num_ranks, len(counts) - history, intervals, decays, max_moves)
    options: dict[str, Any] = {
        "history": history,
        "costs": costs,
        "steps_per_window": steps_per_window,
        "tokens_per_step": tokens_per_step,
    }
    outcomes = list(
        sweep(
            recording,
            policies,
            num_ranks=[num_ranks],
            num_slots=num_slots or slots_to_try(recording.num_experts, num_ranks),
            replica_choices=replica_choices,
            **options,
        )
    )
    best = choose(outcomes)
    # Planned as it would be served; a static plan may then be as good.
    chosen = choose(
        simulate(
            recording,
            policy,
            num_ranks=num_ranks,
            num_slots=best.num_slots,
            replica_choice=best.replica_choice,
            effort=effort,
            **options,
        )
        for policy in dict.fromkeys([best.policy, STATIC])
    )
    in_turn = [outcome for outcome in outcomes if outcome.replica_choice == "even"]
    even = choose(in_turn) if in_turn else None
    made = _recommendation(chosen, even, costs, recording, len(outcomes), min_gain, note)
    return Advice(made, chosen, outcomes, recording, history)


def choose(outcomes: Iterable[Outcome]) -> Outcome:
    """The cheapest of those that gain nearly as much as the best."""
    outcomes = list(outcomes)
    most = max(outcome.gain for outcome in outcomes)
    near = [o for o in outcomes if o.gain >= most - _TOLERANCE * abs(most)]

    def price(outcome: Outcome):
        policy = outcome.policy
        pace = 1 / policy.interval if policy.interval else 0.0
        return outcome.num_slots, pace, outcome.replica_choice != "even", -outcome.gain

    return min(near, key=price)


def divide_window(recording: Recording, number: int) -> Recording:
    """One window as several: each token's choice falls into one of them at random, always alike."""
    counts = recording.expert_counts()[0]
    generator = np.random.default_rng(0)
    parts = np.empty((number, *counts.shape), np.int64)
    left = counts
    for i in range(number):
        parts[i] = generator.binomial(left, 1 / (number - i))
        left = left - parts[i]
    return Recording(
        parts,
        num_experts=recording.num_experts,
        experts_per_token=recording.experts_per_token,
        layer_ids=recording.layer_ids,
        source=recording.source,
    )


def _recommendation(
    chosen: Outcome,
    even: Outcome | None,
    costs: Costs,
    recording: Recording,
    settings: int,
    min_gain: float,
    note: str,
) -> Recommendation:
    gain, error = chosen.gain, chosen.gain_error
    before = float(chosen.unbalanced_imbalance.mean(dtype=np.float64))
    sizes = {"num_ranks": chosen.num_ranks, "num_slots": chosen.num_slots}
    least = costs.least_choices(before, **sizes) / recording.experts_per_token
    noise = math.isfinite(error) and gain <= _ERRORS * error
    balance = gain >= min_gain and not noise
    how = _describe(chosen, recording.num_experts)
    spread = "" if math.isnan(error) else f" (standard error {100 * error:.1f})"
    gained = f"{100 * gain:+.1f}%{spread} throughput"
    if balance:
        reason = (
            f"{how}: expected {gained}, {100 * chosen.move_share:.1f}% of the time spent on moves; "
            f"imbalance {before:.3f} -> {chosen.mean_imbalance:.3f}. Balancing is not worth it "
            f"below {least:,.0f} tokens an iteration: reading the experts' weights then takes "
            "longer than computing."
        )
        if even is not None and chosen.replica_choice != "even":
            reason += (
                " Where replicas get an expert's tokens in turn, as in other engines: "
                f"{_describe(even, recording.num_experts)}: expected {100 * even.gain:+.1f}%."
            )
    elif gain < min_gain:
        reason = (
            f"Don't balance: the best of {settings} settings ({how}) gains {gained}, and less than "
            f"{100 * min_gain:g}% is not worth it. The imbalance is {before:.3f} without balancing."
        )
    else:
        reason = (
            f"Don't balance: the best of {settings} settings ({how}) gains {gained}, which may be "
            "chance. Record more iterations."
        )
    if math.isnan(error):
        note += (
            f" Only {len(chosen.seconds)} of the windows could be scored: how far the gain may be "
            "off is not known."
        )
    return Recommendation(
        balance=balance,
        num_slots=chosen.num_slots,
        replan_every=_replan_every(chosen),
        replica_choice=chosen.replica_choice,
        expected_gain=gain,
        reason=reason + note,
        gain_error=None if math.isnan(error) else error,
        move_share=chosen.move_share,
        decay=chosen.policy.decay,
        max_moves=chosen.policy.max_moves,
        expected_gain_even=None if even is None else even.gain,
        imbalance_before=before,
        imbalance_after=chosen.mean_imbalance,
        least_tokens=least,
    )


def _replan_every(chosen: Outcome) -> int | None:
    """Iterations from plan to plan."""
    interval = chosen.policy.interval
    return None if interval is None else interval * chosen.steps_per_window


def _describe(chosen: Outcome, num_experts: int) -> str:
    replan_every = _replan_every(chosen)
    spare = chosen.num_slots - num_experts
    words = [
        f"{spare} redundant experts per {chosen.num_ranks} ranks ({chosen.num_slots} slots)"
        if spare
        else f"no redundant experts ({chosen.num_slots} slots on {chosen.num_ranks} ranks)"
    ]
    if replan_every is None:
        words.append("one plan beforehand")
    else:
        plural = "iteration" if replan_every == 1 else f"{replan_every} iterations"
        words.append(f"re-plan every {plural}")
        if chosen.policy.max_moves is not None:
            words.append(f"at most {chosen.policy.max_moves} moves of a layer")
        words.append(f"decay {chosen.policy.decay:g}")
    if spare:
        words.append(f"replica choice {chosen.replica_choice}")
    return ", ".join(words)
