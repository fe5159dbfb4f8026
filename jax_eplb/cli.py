"""The command line: parses, and hands over to the command."""

import argparse
import importlib
import sys
from pathlib import Path

from jax_eplb.commands.inputs import (
    add_recording_options,
    parse_integers,
    parse_layers,
    parse_range,
    positive,
    whole,
)
from jax_eplb.commands.plan_options import add_plan_options
from jax_eplb.commands.simulate_options import add_simulate_options
from jax_eplb.formats import ENGINES
from jax_eplb.online import BalancerError


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 where the input is at fault."""
    arguments = build_parser().parse_args(argv)
    # Imported late: a report need not wait for the model, nor a mistyped option for pictures.
    command = importlib.import_module(f"jax_eplb.commands.{arguments.command}")
    try:
        command.run(arguments)
    except (ValueError, OSError, BalancerError) as error:
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
    _add_simulate(commands)
    _add_run(commands)
    _add_reshard(commands)
    _add_convert(commands)
    return parser


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo", help="see a real model unbalanced, planned for, and balanced (under two minutes)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results")
    parser.add_argument("--ep-size", type=positive, default=8, metavar="P", help="devices")
    parser.add_argument(
        "--num-slots", type=positive, metavar="S", help="default: 80, or 72 with --online"
    )
    parser.add_argument(
        "--batches", type=positive, default=4, metavar="N", help="full batches of each run"
    )
    parser.add_argument(
        "--online",
        action="store_true",
        help="let the placement follow text whose kind changes half-way (some minutes)",
    )
    parser.add_argument(
        "--iterations", type=positive, default=480, metavar="N", help="with --online: at least"
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
        "--split",
        choices=("even", "balanced"),
        help="how its replicas divide an expert's tokens (default: even)",
    )
    parser.add_argument(
        "--per-expert", action="store_true", help="over experts (or slots) instead of ranks"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write heat maps there")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write one page: tables, pictures, the plan, and what simulate recommends (from four "
        "iterations on, in one to two minutes)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_plan(commands) -> None:
    parser = commands.add_parser("plan", help="make a load balancer file from a recording")
    add_plan_options(parser)


def _add_simulate(commands) -> None:
    parser = commands.add_parser(
        "simulate", help="whether balancing would pay, and how, replayed from a recording"
    )
    add_simulate_options(parser)


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
        choices=("even", "local", "balanced", "fewest", "auto"),
        help="how tokens are divided among an expert's replicas: in turn (the default), to the "
        "nearest, so that the fullest rank is lightest (plan for it with --split balanced; the "
        "default where the placement follows the load), among as few as their number is worth, or "
        "by the size of the batch: few for a small one, else balanced (--split balanced, too)",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--output", type=Path, metavar="JSONL", help="write there what was generated, as it ends"
    )
    parser.add_argument(
        "--resume", action="store_true", help="serve what the output does not have, and add it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_balancer_options(parser)
    _add_process_options(parser)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "the same command in each; SLURM, Open MPI and Kubernetes say themselves where they are",
    )
    group.add_argument(
        "--distributed", action="store_true", help="join the other processes before the start"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, seen by all")
    group.add_argument("--num-processes", type=positive, metavar="N")
    group.add_argument("--process-id", type=whole, metavar="I", help="0 to N - 1")
    group.add_argument(
        "--heartbeat-timeout",
        type=positive,
        default=100,
        metavar="S",
        help="seconds of silence after which a process counts as lost, and all end",
    )


def _add_balancer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "balancing while serving",
        "where the load balancer file has layer_updates_per_iter above 0: the layers that are "
        "looked at in each iteration",
    )
    group.add_argument(
        "--balancer-warmup",
        type=whole,
        default=0,
        metavar="N",
        help="iterations that are counted before the first update",
    )
    group.add_argument(
        "--window-size",
        type=positive,
        metavar="N",
        help="plan for the last N iterations, not for a load that fades",
    )
    group.add_argument(
        "--change-factor",
        type=float,
        metavar="X",
        help="with --window-size: forget what was before the imbalance became X times as much",
    )
    group.add_argument(
        "--step-interval", type=positive, metavar="N", help="look every N iterations, not in each"
    )
    group.add_argument(
        "--min-balancedness", type=float, metavar="X", help="look only where mean / max is below X"
    )
    group.add_argument(
        "--max-moves", type=positive, metavar="M", help="slots of a layer in one update"
    )
    group.add_argument(
        "--horizon",
        type=positive,
        metavar="N",
        help="move only what pays for itself within N iterations",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep load and placement there, and begin with those that are there",
    )
    group.add_argument(
        "--checkpoint-interval",
        type=positive,
        default=1000,
        metavar="N",
        help="iterations between two of them; the last is kept at the end",
    )
    group.add_argument("--events", type=Path, metavar="JSONL", help="write every update there")
    group.add_argument(
        "--prometheus-port",
        type=whole,
        metavar="PORT",
        help="serve counters and gauges there; 0: any that is free",
    )


def _add_reshard(commands) -> None:
    parser = commands.add_parser(
        "reshard", help="rewrite a checkpoint for other ranks and slots, or as another format"
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="checkpoints of jax_eplb, one of their steps, or safetensors: a file or a directory",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    parser.add_argument("--ep-size", type=positive, required=True, metavar="P", help="ranks")
    parser.add_argument(
        "--num-slots", type=positive, metavar="S", help="default: the plan's, or the fewest"
    )
    placement = parser.add_mutually_exclusive_group()
    placement.add_argument(
        "--load-balancer", metavar="FILE", help="the placement; default: the initial layout"
    )
    placement.add_argument("--recording", metavar="PATH", help="plan a placement for this load")
    parser.add_argument(
        "--default-layers",
        type=parse_integers,
        default=[],
        metavar="L,L,...",
        help="layers that the plan does not name, laid out initially (DeepSeek-V3's is 61)",
    )
    parser.add_argument(
        "--format", choices=("orbax", "safetensors"), help="of OUT; default: as CKPT"
    )
    parser.add_argument(
        "--layout",
        choices=("experts", "slots"),
        default="experts",
        help="in expert order, or a file for each rank with its slots in order",
    )
    parser.add_argument("--step", type=whole, metavar="N", help="of CKPT; default: the last")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert", help="write a plan, or a recording, as another engine reads it"
    )
    add_recording_options(
        parser, "IN", "a plan or a recording of any engine; which, is told by its content"
    )
    parser.add_argument("out", metavar="OUT", help="a file; TensorRT-LLM's statistics: a directory")
    parser.add_argument("--to", choices=(*ENGINES, "jax-eplb"), required=True)
    parser.add_argument(
        "--ep-size", type=positive, metavar="P", help="ranks of the plan, where IN does not say"
    )
    parser.add_argument(
        "--layers",
        type=parse_layers,
        metavar="L-L[,L...]",
        help="ids of the model's MoE layers, both ends included (DeepSeek-V3: 3-60)",
    )
    parser.add_argument(
        "--num-layers",
        type=positive,
        metavar="L",
        help="layers of the whole model, for SGLang; default: up to the last MoE layer",
    )
    parser.add_argument(
        "--layer-updates-per-iter", type=whole, metavar="K", help="of TensorRT-LLM's plan"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
