"""`jax-eplb report`: how even the ranks' load was, or would have been under a plan."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jax_eplb.commands.inputs import option_name, read_recording
from jax_eplb.commands.progress import progress_bars
from jax_eplb.commands.report_log import print_log
from jax_eplb.commands.simulate import compare, recorded_ranks
from jax_eplb.formats import Kind, kind_of, load_balancedness, load_placement
from jax_eplb.load import Recording
from jax_eplb.plot import recording_figures, save_figures
from jax_eplb.report import build_report
from jax_eplb.report_page import report_page
from jax_eplb.simulate import recommend

# Fewer iterations leave fewer than three to score, and then no telling how far a gain may be off.
_LEAST_ITERATIONS = 4


def run(arguments: argparse.Namespace) -> None:
    if kind_of(Path(arguments.recording)) is Kind.UNKNOWN:
        series = load_balancedness(arguments.recording)
        if series:
            for option in ("ep_size", "load_balancer", "split", "plot", "html", "per_expert"):
                if getattr(arguments, option):
                    name = option_name(option)
                    raise ValueError(f"{arguments.recording}: a log, which {name} cannot use")
            print_log(series, arguments.json)
            return
    recording = read_recording(arguments)
    placement = None
    if arguments.split is not None and arguments.load_balancer is None:
        raise ValueError("--split needs --load-balancer, the plan that it is for")
    if arguments.load_balancer is not None:
        num_ranks = arguments.ep_size
        if num_ranks is None:
            raise ValueError("--load-balancer needs --ep-size, the number of ranks it is for")
        placement = load_placement(
            arguments.load_balancer,
            num_ranks=num_ranks,
            num_experts=recording.num_experts,
            layer_ids=recording.layer_ids,
            unsafe_pickle=arguments.unsafe_pickle,
        )
    # What the table, the pictures and the page are of.
    told: dict[str, Any] = {
        "num_ranks": arguments.ep_size,
        "placement": placement,
        "split": arguments.split or "even",
    }
    report = build_report(recording, **told, per_expert=arguments.per_expert)
    files = []
    if arguments.plot is not None:
        figures = recording_figures(recording, **told)
        files += save_figures(arguments.plot, figures)
    if arguments.html is not None:
        page = _page(recording, told)
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(page, encoding="utf-8")
        files.append(arguments.html)
    if arguments.json:
        print(json.dumps(report.to_json()))
        return
    print(report.to_text())
    for file in files:
        print(file)


def _page(recording: Recording, told: dict[str, Any]) -> str:
    found = len(recording.iterations)
    if found < _LEAST_ITERATIONS:
        why = (
            f"The recording has {found} iterations; with {_LEAST_ITERATIONS} or more this page "
            "says whether balancing pays, and how."
        )
        return report_page(recording, advice=why, **told)
    with progress_bars(shown=sys.stderr.isatty()) as bars:
        bars.add_task("simulation", total=None)
        try:
            advice = recommend(recording, num_ranks=told["num_ranks"] or recorded_ranks(recording))
            compared = compare(advice)
        except ValueError as error:
            why = f"The simulator cannot replay this recording: {error}"
            return report_page(recording, advice=why, **told)
    return report_page(recording, advice=advice, compared=compared, **told)
