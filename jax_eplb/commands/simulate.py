"""`jax-eplb simulate`: whether balancing pays, how, and what each policy would have done."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from jax_eplb.commands.inputs import read_recording
from jax_eplb.commands.kept_programs import keep_programs
from jax_eplb.commands.progress import progress_bars
from jax_eplb.load import Recording
from jax_eplb.simulate import (
    NONE,
    ORACLE,
    STATIC,
    Advice,
    Costs,
    Outcome,
    costs_of,
    every,
    online,
    read_device,
    read_model,
    recommend,
    simulate,
    threshold,
)
from jax_eplb.simulate.recommend import REPLICA_CHOICES

# Policies to compare; the interval and the threshold where the recommendation has none.
_INTERVAL = 4
# Plan again where imbalance has become so many times what the recommended setting leaves.
_WORSE = 1.5


def run(arguments: argparse.Namespace) -> None:
    keep_programs()
    recording = read_recording(arguments)
    num_ranks = arguments.ep_size or recorded_ranks(recording)
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
            intervals=arguments.intervals,
            decays=arguments.decays,
            max_moves=arguments.max_moves,
            replica_choices=arguments.replica_choice or REPLICA_CHOICES,
            history=arguments.history,
            min_gain=arguments.min_gain,
            effort=arguments.effort,
            **options,
        )
        bars.update(task, description="policies")
        compared = compare(advice, **options)
    pictures = []
    if arguments.plot is not None:
        # Imported late: where no picture is asked for, none need wait for matplotlib.
        from jax_eplb.plot import save_figures
        from jax_eplb.simulate.plot import advice_figures

        pictures = save_figures(arguments.plot, advice_figures(advice, compared))
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


def recorded_ranks(recording: Recording) -> int:
    """The ranks of the recorded run; ValueError where the recording does not say."""
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


def compare(advice: Advice, **options: Any) -> list[Outcome]:
    """Each kind of policy at the recommended size, the recommended one last.

    `options` are those of `recommend` that `simulate` has, too.
    """
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
