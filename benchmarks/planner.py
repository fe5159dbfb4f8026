"""The planner's benchmark: imbalance, times, moves, memory, beside the planners of other engines.

    python -m benchmarks.planner [--only SECTION,SECTION] [--json | --markdown]
        [--peer NAME=FILE ...] [--peer-python PYTHON] [--recordings FILE.npz ...]
        [--figure FILE.png] [--repeats N]

Sections, all of them unless --only names some:

    one-load   one load, even split: imbalance, lower bound, who is better how often
    times      warm times of one plan
    windows    recordings, even split: planned on some windows, scored on others
    balanced   recordings, balanced split: held out, and re-planned window by window
    moves      what few moves from the placement in force bring
    topology   groups on nodes, replicas spread over nodes, ranks of unequal speed
    bounds     the lower bound and its time, for larger sizes too
    scale      time and memory against layers, slots and ranks (--figure draws them)
    devices    the same plans on the CPU and on the default device

Figures are means over layers, scored in float64 on the host. `tables.Table` holds what is printed.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import machine
from benchmarks.balanced import balanced
from benchmarks.bounds import bounds
from benchmarks.devices import devices
from benchmarks.held_out import held_out
from benchmarks.moving import moving
from benchmarks.one_load import one_load
from benchmarks.peers import PeerError, Peers, add_peer_arguments, parse_peers
from benchmarks.recording_files import RecordingError, read_recordings
from benchmarks.scaling import scaling
from benchmarks.setting import Setting
from benchmarks.tables import Table
from benchmarks.times import times
from benchmarks.topology import topology
from jax_eplb.commands.progress import progress_bars

SECTIONS: dict[str, Callable[[Setting], list[Table]]] = {
    "one-load": one_load,
    "times": times,
    "windows": held_out,
    "balanced": balanced,
    "moves": moving,
    "topology": topology,
    "bounds": bounds,
    "scale": scaling,
    "devices": devices,
}

_FILE_WIDTH = 200  # where no terminal says how wide a table may be


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections asked for; 2 where an option cannot be followed."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: write 1 or more")
    if given.figure and "scale" not in given.only:
        parser.error("--figure shows the section scale: add it to --only")
    try:
        opponents = parse_peers(given.peer, given.peer_python)
        recordings, notes = read_recordings(given.recordings)
        with contextlib.ExitStack() as stack:
            peers = None
            if opponents:
                peers = stack.enter_context(Peers(opponents, given.peer_threads))
            bars = stack.enter_context(progress_bars())
            setting = Setting(
                opponents=opponents,
                peers=peers,
                peer_threads=given.peer_threads,
                recordings=recordings,
                repeats=given.repeats,
                figure=given.figure,
                progress=bars,
            )
            _run(given, setting, notes)
    except (PeerError, RecordingError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.planner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_peer_arguments(parser)
    parser.add_argument(
        "--peer-threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of each (1: their tensors are small, more make them slower)",
    )
    parser.add_argument(
        "--recordings",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE.npz",
        help="counts [windows, layers, experts], or a trace expert_ids [tokens, layers, choices]",
    )
    parser.add_argument(
        "--only",
        type=_sections,
        default=list(SECTIONS),
        metavar="SECTION,...",
        help=f"run these alone: {', '.join(SECTIONS)}",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timed calls")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw time against size")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print GitHub's tables")
    return parser


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no section {', '.join(unknown) or 'named'}; there are {', '.join(SECTIONS)}"
        )
    return names


def _run(given: argparse.Namespace, setting: Setting, notes: list[str]) -> None:
    """Print each section's tables as soon as it ends; JSON when all have ended."""
    about = machine.describe() | {"load_average_at_start": machine.load_average()}
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    done: dict[str, list[Table]] = {}
    for name in given.only:
        done[name] = SECTIONS[name](setting)
        if given.json:
            continue
        for table in done[name]:
            if given.markdown:
                print(f"{table.as_markdown()}\n", flush=True)
            else:
                console.print(table.as_rich())
    about["load_average_at_end"] = machine.load_average()
    if given.json:
        tables = {name: [table.as_data() for table in made] for name, made in done.items()}
        print(json.dumps({"machine": about, "notes": notes, "sections": tables}, allow_nan=False))
        return
    for note in [*notes, "; ".join(f"{key.replace('_', ' ')}: {v}" for key, v in about.items())]:
        print(note)


if __name__ == "__main__":
    sys.exit(main())
