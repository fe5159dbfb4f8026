"""The options of `jax-eplb plan`."""

import argparse
import math
from pathlib import Path

from jax_eplb.commands.inputs import (
    add_recording_options,
    parse_moves,
    parse_numbers,
    positive,
    whole,
)
from jax_eplb.planner.effort import EFFORTS


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    add_recording_options(parser)
    parser.add_argument("--ep-size", type=positive, required=True, metavar="P", help="ranks")
    parser.add_argument(
        "--num-slots", type=positive, metavar="S", help="default: the number of experts"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--effort", choices=tuple(EFFORTS), default="default", help="how long to search"
    )
    parser.add_argument(
        "--split",
        choices=("even", "balanced"),
        default="even",
        help="how the layer divides an expert's tokens among its replicas",
    )
    parser.add_argument(
        "--method",
        choices=("search", "deepseek"),
        default="search",
        help="deepseek: the plans of deepseek-ai/EPLB, slot for slot",
    )
    parser.add_argument(
        "--previous", metavar="FILE", help="the load balancer file in force: move few slots"
    )
    parser.add_argument(
        "--max-moves",
        type=parse_moves,
        metavar="M[,M...]",
        help="with --previous: slots of a layer that may change, or all; several print what each "
        "would give, and the last is written",
    )
    parser.add_argument("--num-nodes", type=positive, default=1, metavar="Q")
    parser.add_argument(
        "--num-groups", type=positive, default=1, metavar="G", help="groups that stay on a node"
    )
    parser.add_argument(
        "--cross-node-weight",
        type=float,
        metavar="X",
        help="let groups leave their nodes where imbalance falls by X times the part of the tokens",
    )
    parser.add_argument(
        "--spread-replicas", action="store_true", help="replicas of an expert on two nodes or more"
    )
    parser.add_argument(
        "--capacity",
        type=_parse_capacity,
        metavar="C,C,...",
        help="relative speed of each rank",
    )
    parser.add_argument(
        "--layer-updates-per-iter",
        type=whole,
        default=0,
        metavar="K",
        help="written to the file: layers that TensorRT-LLM may update in an iteration",
    )
    parser.add_argument("--verbose", action="store_true", help="figures of each layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _parse_capacity(text: str) -> list[float]:
    """Speeds above 0, for argparse. The file cannot say that the slots of a rank are empty.

    >>> _parse_capacity("1,0.5")
    [1.0, 0.5]
    """
    speeds = parse_numbers(text)
    if not all(0 < speed < math.inf for speed in speeds):
        raise argparse.ArgumentTypeError(
            f"{text!r}: each rank's speed must be above 0; leave a rank that is gone out of P"
        )
    return speeds
