"""The command line: parses, and hands over to the command."""

import argparse
import importlib
import sys
from pathlib import Path

from jax_eplb.commands.inputs import add_recording_options, parse_range, positive, whole
from jax_eplb.commands.plan_options import add_plan_options


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 where the input is at fault."""
    arguments = build_parser().parse_args(argv)
    # Imported late: a report need not wait for the model, nor a mistyped option for pictures.
    command = importlib.import_module(f"jax_eplb.commands.{arguments.command}")
    try:
        command.run(arguments)
    except (ValueError, OSError) as error:
        print(f"jax-eplb {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-eplb", description="Load balancing for Mixture-of-Experts models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_report(commands)
    _add_plan(commands)
    _add_run(commands)
    return parser


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo", help="see a real model unbalanced, planned for, and balanced (under two minutes)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results")
    parser.add_argument("--ep-size", type=positive, default=8, metavar="P", help="devices")
    parser.add_argument("--num-slots", type=positive, default=80, metavar="S")
    parser.add_argument(
        "--batches", type=positive, default=4, metavar="N", help="full batches of each run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="how even the ranks' load was, by layer")
    add_recording_options(parser)
    parser.add_argument("--ep-size", type=positive, metavar="P", help="number of ranks")
    parser.add_argument(
        "--load-balancer", metavar="FILE", help="predict what this plan would have given"
    )
    parser.add_argument(
        "--per-expert", action="store_true", help="over experts (or slots) instead of ranks"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write heat maps there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_plan(commands) -> None:
    parser = commands.add_parser("plan", help="make a load balancer file from a recording")
    add_plan_options(parser)


def _add_run(commands) -> None:
    parser = commands.add_parser("run", help="serve requests from a file, recording the load")
    parser.add_argument("--model", type=Path, required=True, metavar="YAML")
    parser.add_argument(
        "--dataset", type=Path, required=True, metavar="JSONL", help="one request a line"
    )
    parser.add_argument("--ep-size", type=positive, required=True, metavar="P", help="devices")
    parser.add_argument("--load-balancer", metavar="FILE", help="placement; default: the initial")
    parser.add_argument(
        "--record", type=Path, metavar="PATH", help="a directory, or a .npz or .safetensors file"
    )
    parser.add_argument(
        "--record-iters", type=parse_range, default=(0, None), metavar="A-B", help="B not included"
    )
    parser.add_argument(
        "--warmup", type=whole, default=0, metavar="N", help="requests served first, not measured"
    )
    parser.add_argument(
        "--max-batch-size", type=positive, default=8, metavar="N", help="sequences of a rank"
    )
    parser.add_argument(
        "--moe-max-num-tokens",
        type=positive,
        metavar="N",
        help="rows that a rank receives in one wave of the exchange, at most",
    )
    parser.add_argument(
        "--replica-choice",
        choices=("even", "local", "balanced"),
        default="even",
        help="how tokens are divided among an expert's replicas: in turn, to the nearest, or so "
        "that the fullest rank is lightest (plan for it with --split balanced)",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--output", type=Path, metavar="JSONL", help="write what was generated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
