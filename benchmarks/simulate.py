"""The simulator: whether its recommendations hold, how fast it is, and its model of costs.

    python -m benchmarks.simulate --recordings FILE.npz ... [--only SECTION,SECTION] [--markdown]

Sections, all of them unless --only names some:

    held-out   recommended from the first half of each recording, confirmed on the second
    speed      200 settings over the largest recording, with and without compiling
    costs      the byte model: predicted and measured times of its fullest ranks (no recording)

Arrays of a file with three axes are recordings, counts [windows, layers, experts]. One whose name
begins with that of a preset of configs/simulate/models/ has that model's costs, on H200s; others
have the defaults, and a token of theirs is one choice unless --experts-per-token says more.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import machine
from benchmarks.recording_files import RecordingError, read_recordings
from benchmarks.step_times import RANKS, step_times
from benchmarks.tables import Column, Table
from jax_eplb.load import Recording
from jax_eplb.mesh import simulate_devices
from jax_eplb.placement import fewest_slots
from jax_eplb.simulate import (
    STATIC,
    Costs,
    costs_of,
    online,
    read_device,
    read_model,
    recommend,
    simulate,
    sweep,
)

_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "simulate"
SECTIONS = ("held-out", "speed", "costs")
_WIDTH = 200  # where no terminal says how wide a table may be


def read(
    paths: list[str], experts_per_token: Mapping[str, int]
) -> tuple[list[Recording], list[str]]:
    """The recordings of some files, and notes on what was left out.

    `experts_per_token` is by the beginning of a name, for those without a preset.
    """
    found, notes = read_recordings(paths, least_windows=1, any_experts=True)
    recordings = []
    for each in found:
        preset = _preset_of(each.name)
        if preset is None:
            given = (k for name, k in experts_per_token.items() if each.name.startswith(name))
            choices = next(given, 1)
        else:
            choices = read_model(preset).experts_per_token
        recordings.append(
            Recording(
                each.windows.astype(np.int64),
                num_experts=each.num_experts,
                experts_per_token=choices,
                source=each.name,
            )
        )
    return recordings, notes


def held_out(recordings: list[Recording], ranks: dict[int, int], tokens: int) -> Table:
    """What was predicted from the first half, and what the second half gave."""
    rows = []
    for recording in recordings:
        costs, windows = _costs_of(recording), len(recording.iterations)
        half = -(-windows // 2)
        num_ranks = ranks.get(recording.num_experts, 8)
        first = recording.keep(range(half))
        options: dict[str, Any] = {"costs": costs, "tokens_per_step": tokens}
        made = recommend(first, num_ranks=num_ranks, **options)
        word, chosen = made.recommendation, made.chosen
        row: dict[str, Any] = {
            "recording": recording.source,
            "ranks": num_ranks,
            "balance": "yes" if word.balance else "no",
            "slots": word.num_slots,
            "policy": chosen.policy.describe(),
            "choice": word.replica_choice,
            "predicted": 100 * word.expected_gain,
            "error": None if word.gain_error is None else 100 * word.gain_error,
        }
        if windows > 1:
            later = simulate(
                recording,
                chosen.policy,
                num_ranks=num_ranks,
                num_slots=word.num_slots,
                replica_choice=word.replica_choice,
                history=half,
                **options,
            )
            row |= {
                "realised": 100 * later.gain,
                "ratio": word.expected_gain / later.gain,
                "speed": (1 + word.expected_gain) / (1 + later.gain),
                "before": later.unbalanced_imbalance.mean(),
                "after": later.mean_imbalance,
            }
        rows.append(row)
    columns = [
        Column("recording", "recording"),
        Column("ranks", "ranks"),
        Column("balance", "balance"),
        Column("slots", "slots"),
        Column("policy", "policy"),
        Column("choice", "replicas"),
        Column("predicted", "predicted gain, %", 1),
        Column("error", "standard error", 1),
        Column("realised", "realised, %", 1),
        Column("ratio", "predicted / realised gain", 2),
        Column("speed", "predicted / realised throughput", 2),
        Column("before", "second half: imbalance without", 3),
        Column("after", "with", 3),
    ]
    title = "Recommended from the first half of a recording, replayed on the second"
    return Table(title, columns, rows)


def speed(recordings: list[Recording], ranks: dict[int, int]) -> Table:
    """Two hundred settings over the largest recording, twice: the first time compiles."""
    recording = max(recordings, key=lambda r: r.counts.shape[0] * r.counts.shape[1])
    num_ranks, experts = ranks.get(recording.num_experts, 8), recording.num_experts
    fewest = fewest_slots(experts, num_ranks)
    policies = [
        online(decay, moves, interval)
        for interval in (4, 8, 16, 32, 64)
        for decay in (0.5, 0.7, 0.8, 0.9, 0.95)
        for moves in (num_ranks // 2, None)
    ]
    policies = [STATIC, *policies[1:]]
    rows = []
    for choices in (("even",), ("even", "balanced")):
        slots = [fewest + spare * num_ranks for spare in range(1, 1 + 4 // len(choices))]
        for turn in ("compiled", "again"):
            begun = time.perf_counter(), time.process_time()
            outcomes = list(
                sweep(
                    recording,
                    policies,
                    num_ranks=[num_ranks],
                    num_slots=slots,
                    replica_choices=choices,
                )
            )
            wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
            windows = len(outcomes) * recording.counts.shape[0] * recording.counts.shape[1]
            rows.append(
                {
                    "sweep": f"{recording.source}, {', '.join(choices)}, {turn}",
                    "settings": len(outcomes),
                    "windows": windows,
                    "wall": wall,
                    "cpu": cpu,
                    "rate": windows / wall,
                }
            )
    columns = [
        Column("sweep", "sweep"),
        Column("settings", "settings", 0),
        Column("windows", "layer-windows", 0),
        Column("wall", "seconds", 1),
        Column("cpu", "CPU seconds", 1),
        Column("rate", "layer-windows a second", 0),
    ]
    return Table("Speed of a sweep", columns, rows)


def _preset_of(name: str) -> Path | None:
    found = (p for p in (_CONFIGS / "models").glob("*.yaml") if name.startswith(p.stem))
    return next(found, None)


def _costs_of(recording: Recording) -> Costs:
    preset = _preset_of(recording.source)
    if preset is None:
        return Costs()
    return costs_of(read_model(preset), read_device(_CONFIGS / "devices" / "h200.yaml"))


def _parse_pairs(text: str) -> dict[str, int]:
    """
    >>> _parse_pairs("32:8,128:16")
    {'32': 8, '128': 16}
    """
    pairs = (part.rsplit(":", 1) for part in text.split(","))
    return {name: int(number) for name, number in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--recordings", nargs="+", default=[], metavar="FILE.npz")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,...")
    parser.add_argument(
        "--ranks", type=_parse_pairs, default={"128": 16}, metavar="E:P,...", help="others: 8"
    )
    parser.add_argument(
        "--experts-per-token",
        type=_parse_pairs,
        default={},
        metavar="NAME:K,...",
        help="of recordings whose names begin so, where there is no preset",
    )
    parser.add_argument(
        "--tokens-per-iteration",
        type=int,
        default=16_384,
        metavar="T",
        help="that costs are for; the recorded windows may be far smaller (default: 16384)",
    )
    parser.add_argument("--markdown", action="store_true", help="as in docs/simulator.md")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if not set(wanted) <= set(SECTIONS):
        parser.error(f"--only {arguments.only}: the sections are {', '.join(SECTIONS)}")
    if not arguments.recordings and set(wanted) != {"costs"}:
        parser.error("held-out and speed need --recordings FILE.npz")
    if "costs" in wanted:
        simulate_devices(RANKS)
    about = machine.describe() | {"load_average_at_start": machine.load_average()}
    try:
        recordings, notes = read(arguments.recordings, arguments.experts_per_token)
    except RecordingError as error:
        parser.error(str(error))
    ranks = {int(experts): number for experts, number in arguments.ranks.items()}
    console = Console(width=None if Console().is_terminal else _WIDTH)
    for name in wanted:
        if name == "costs":
            table = step_times()
        else:
            given = recordings, ranks
            tokens = arguments.tokens_per_iteration
            table = held_out(*given, tokens) if name == "held-out" else speed(*given)
        if arguments.markdown:
            print(table.as_markdown(), end="\n\n", flush=True)
        else:
            console.print(table.as_rich())
    about["load_average_at_end"] = machine.load_average()
    for note in [*notes, "; ".join(f"{key.replace('_', ' ')}: {v}" for key, v in about.items())]:
        print(note)


if __name__ == "__main__":
    main()
