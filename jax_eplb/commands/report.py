"""`jax-eplb report`: how even the ranks' load was, or would have been under a plan."""

import argparse
import json
from pathlib import Path

from jax_eplb.commands.inputs import read_recording
from jax_eplb.commands.report_log import print_log
from jax_eplb.formats import Kind, kind_of, load_balancedness, load_placement
from jax_eplb.plot import plot_recording
from jax_eplb.report import build_report


def run(arguments: argparse.Namespace) -> None:
    if kind_of(Path(arguments.recording)) is Kind.UNKNOWN:
        series = load_balancedness(arguments.recording)
        if series:
            for option in ("ep_size", "load_balancer", "plot", "per_expert"):
                if getattr(arguments, option):
                    name = option.replace("_", "-")
                    raise ValueError(f"{arguments.recording}: a log, which --{name} cannot use")
            print_log(series, arguments.json)
            return
    recording = read_recording(arguments)
    placement = None
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
    report = build_report(
        recording,
        num_ranks=arguments.ep_size,
        placement=placement,
        per_expert=arguments.per_expert,
    )
    pictures = []
    if arguments.plot is not None:
        pictures = plot_recording(
            arguments.plot, recording, num_ranks=arguments.ep_size, placement=placement
        )
    if arguments.json:
        print(json.dumps(report.to_json()))
        return
    print(report.to_text())
    for picture in pictures:
        print(picture)
