"""`jax-eplb simulate`: whether balancing pays, how, and what each policy would have done."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jax_eplb.commands.inputs import read_recording
from jax_eplb.commands.progress import progress_bars
from jax_eplb.simulate import (
    NONE,
    ORACLE,
    STATIC,
    Advice,
    Costs,
    Outcome,
    Policy,
    bound_of,
    costs_of,
    every,
    online,
    read_device,
    read_model,
    recommend,
    simulate,
    threshold,
)

# Policies to compare; the interval and the threshold where the recommendation has none.
_INTERVAL = 4
# Plan again where imbalance has become so many times what the recommended setting leaves.
_WORSE = 1.5


def run(arguments: argparse.Namespace) -> None:
    recording = read_recording(arguments)
    num_ranks = arguments.ep_size or _recorded_ranks(recording)
    costs = _costs(arguments)
    options: dict[str, Any] = {
        "costs": costs,
        "steps_per_window": arguments.iterations_per_window,
        "tokens_per_step": arguments.tokens_per_iteration,
    }
    with progress_bars(shown=sys.stderr.isatty()) as bars:
        task = bars.add_task("sweep", total=None)
        advice = recommend(
            recording,
            num_ranks=num_ranks,
            num_slots=arguments.num_slots,
            policies=_policies(arguments),
            replica_choices=arguments.replica_choice or ("even", "balanced"),
            history=arguments.history,
            min_gain=arguments.min_gain,
            effort=arguments.effort,
            **options,
        )
        bars.update(task, description="policies")
        compared = _compare(advice, options)
    pictures = []
    if arguments.plot is not None:
        pictures = _draw(arguments.plot, advice, compared)
    if arguments.json:
        figures = {
            "recommendation": advice.recommendation.to_json(),
            "costs": dataclasses.asdict(costs),
            "iterations": len(advice.recording.iterations),
            "history": advice.history,
            "policies": [outcome.to_json() for outcome in compared],
            "sweep": [outcome.to_json() for outcome in advice.outcomes],
        }
        print(json.dumps(figures))
        return
    print(_table(compared))
    print(
        f"{len(advice.chosen.seconds)} of {len(advice.recording.iterations)} windows scored, each "
        f"by plans made from those before it; {len(advice.outcomes)} settings tried."
    )
    print(advice.recommendation.reason)
    for picture in pictures:
        print(picture)


def _recorded_ranks(recording) -> int:
    if recording.rank_tokens is not None:
        return recording.rank_tokens.shape[-1]
    if recording.placement is not None:
        return recording.placement.num_ranks
    raise ValueError(
        f"{recording.source}: the recording does not say on how many ranks its tokens were "
        "computed; give the number of ranks (--ep-size)"
    )


def _costs(arguments: argparse.Namespace) -> Costs:
    if (arguments.model is None) != (arguments.device is None):
        raise ValueError("--model and --device belong together: sizes, and how fast they run")
    costs = Costs()
    if arguments.model is not None:
        costs = costs_of(read_model(arguments.model), read_device(arguments.device))
    names = (field.name for field in dataclasses.fields(Costs))
    given = {name: getattr(arguments, name) for name in names}
    return dataclasses.replace(costs, **{k: v for k, v in given.items() if v is not None})


def _policies(arguments: argparse.Namespace) -> list[Policy] | None:
    """All that the options combine to; None where they say nothing."""
    given = arguments.intervals, arguments.decays, arguments.max_moves
    if given == (None, None, None):
        return None
    intervals, decays, limits = arguments.intervals or [1, 4], arguments.decays, given[2]
    following = [
        online(decay, limit, interval)
        for interval in intervals
        for decay in decays or [0.8]
        for limit in limits or [None]
    ]
    return [STATIC, *following]


def _compare(advice: Advice, options: dict[str, Any]) -> list[Outcome]:
    """Each kind of policy at the recommended size, the recommended one last."""
    chosen = advice.chosen
    interval = chosen.policy.interval or _INTERVAL
    policies = [
        NONE,
        STATIC,
        every(interval),
        threshold(round(_WORSE * chosen.mean_imbalance, 3)),
        online(),
        ORACLE,
    ]
    size = {"num_ranks": chosen.num_ranks, "replica_choice": chosen.replica_choice}
    return [
        *(
            simulate(
                advice.recording,
                policy,
                # Who does not balance needs no spare slots.
                num_slots=chosen.num_slots if policy.planned else None,
                history=advice.history,
                **size,
                **options,
            )
            for policy in policies
        ),
        chosen,
    ]


def _table(outcomes: list[Outcome]) -> str:
    names = [outcome.policy.describe() for outcome in outcomes]
    names[-1] = f"recommended: {names[-1]}"
    wide = max(map(len, names))
    last = outcomes[-1]
    lines = [
        f"{last.num_slots} slots on {last.num_ranks} ranks, replica choice {last.replica_choice}",
        f"{'policy':<{wide}}  imbalance  throughput  moves/window/layer  time of moves",
    ]
    for name, outcome in zip(names, outcomes, strict=True):
        lines.append(
            f"{name:<{wide}} {outcome.mean_imbalance:>10.3f}  {100 * outcome.gain:>+9.1f}%"
            f"  {outcome.moves.mean():>18.2f}  {100 * outcome.move_share:>12.2f}%"
        )
    return "\n".join(lines)


def _draw(directory: Path, advice: Advice, compared: list[Outcome]) -> list[Path]:
    # Imported late: where no picture is asked for, none need wait for matplotlib.
    from jax_eplb.simulate import plot

    recording, history = advice.recording, advice.history
    bounds: dict[str, dict[int, float]] = {}
    for outcome in advice.outcomes:
        by_slots = bounds.setdefault(outcome.replica_choice, {})
        if outcome.num_slots not in by_slots:
            by_slots[outcome.num_slots] = bound_of(
                recording,
                num_ranks=outcome.num_ranks,
                num_slots=outcome.num_slots,
                history=history,
                replica_choice=outcome.replica_choice,
            )
    size = advice.chosen.num_slots
    figures = {
        "imbalance_over_time": plot.imbalance_over_time(compared, recording.iterations[history:]),
        "imbalance_by_redundancy": plot.imbalance_by_redundancy(
            advice.outcomes, bounds, recording.num_experts
        ),
        "gain_by_interval": plot.gain_by_interval(
            [outcome for outcome in advice.outcomes if outcome.num_slots == size]
        ),
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files
