"""The options of `jax-eplb simulate`."""

import argparse
from pathlib import Path

from jax_eplb.commands.inputs import (
    add_recording_options,
    parse_moves,
    parse_numbers,
    positive,
)
from jax_eplb.planner import EFFORTS


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    add_recording_options(parser)
    parser.add_argument(
        "--ep-size", type=positive, metavar="P", help="ranks; default: the recorded ones"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write three pictures there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_sweep_options(parser.add_argument_group("what is tried"))
    _add_cost_options(
        parser.add_argument_group(
            "what things cost",
            "by default as for bfloat16 experts on H200s; files of configs/simulate/ for a model "
            "and a device, or figures of your own",
        )
    )


def _add_sweep_options(group) -> None:
    group.add_argument(
        "--num-slots", type=_parse_positive, metavar="S[,S...]", help="default: E to E + 2 P"
    )
    group.add_argument(
        "--replica-choice",
        type=_parse_choices,
        metavar="even[,balanced]",
        help="default: both; engines other than this one's have even",
    )
    group.add_argument(
        "--intervals",
        type=_parse_positive,
        metavar="N[,N...]",
        help="windows from plan to plan; default: 1, 4, 16, 64, as far as there are windows",
    )
    group.add_argument(
        "--decays",
        type=_parse_decays,
        metavar="X[,X...]",
        help="what a window counts less with each that follows; default: 0.5, 0.8, 0.95",
    )
    group.add_argument(
        "--max-moves",
        type=_parse_limits,
        metavar="M[,all...]",
        help="slots of a layer that a plan may change; default: P / 2, all",
    )
    group.add_argument(
        "--history",
        type=positive,
        metavar="N",
        help="windows that the first plan is made from, not scored; default: a quarter",
    )
    group.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="fast",
        help="of the planner in the recommended setting's replay; the sweep's is fast",
    )
    group.add_argument(
        "--min-gain",
        type=float,
        default=0.05,
        metavar="X",
        help="a smaller gain is not worth it; default: 0.05",
    )


def _add_cost_options(group) -> None:
    group.add_argument("--model", type=Path, metavar="YAML", help="with --device: sizes")
    group.add_argument("--device", type=Path, metavar="YAML", help="with --model: speeds")
    group.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="X",
        help="tokens × top-k that a rank computes in one layer",
    )
    group.add_argument("--bytes-per-expert", type=float, metavar="X", help="in one layer")
    group.add_argument(
        "--bytes-per-second", type=float, metavar="X", help="of weights moved, into a rank"
    )
    group.add_argument("--memory-bytes-per-second", type=float, metavar="X")
    group.add_argument(
        "--attention-share",
        type=float,
        metavar="X",
        help="part of a balanced step that does not depend on the placement",
    )
    group.add_argument(
        "--tokens-per-iteration",
        type=positive,
        metavar="T",
        help="where serving will have other batches than the recording; its skew is kept",
    )
    group.add_argument(
        "--iterations-per-window",
        type=positive,
        default=1,
        metavar="N",
        help="how many iterations a recorded window stands for",
    )


def _parse_positive(text: str) -> list[int]:
    """Integers of 1 or more: "40,48".

    >>> _parse_positive("40,48")
    [40, 48]
    """
    return [positive(part) for part in text.split(",")]


def _parse_limits(text: str) -> list[int | None]:
    """Limits of moves: "8,all".

    >>> _parse_limits("8,all")
    [8, None]
    """
    limits = parse_moves(text)
    if 0 in limits:
        raise argparse.ArgumentTypeError("0 moves is a static plan, which is always compared")
    return limits


def _parse_decays(text: str) -> list[float]:
    """Numbers above 0, up to 1: "0.5,0.95".

    >>> _parse_decays("0.5,0.95")
    [0.5, 0.95]
    """
    values = parse_numbers(text)
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: decays are above 0, and at most 1")
    return values


def _parse_choices(text: str) -> list[str]:
    """Replica choices: "even,balanced".

    >>> _parse_choices("even")
    ['even']
    """
    choices = text.split(",")
    if not set(choices) <= {"even", "balanced"}:
        raise argparse.ArgumentTypeError(f"{text!r}: use even, balanced, or both")
    return choices
