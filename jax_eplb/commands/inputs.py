"""What several commands read: recordings as the options describe them, and ranges."""

import argparse
from pathlib import Path

from jax_eplb.formats import load_placement, load_recording
from jax_eplb.formats.arrays import Options
from jax_eplb.load import Recording

_MAX_LAYERS = 10_000


def read_recording(arguments: argparse.Namespace) -> Recording:
    """The recording that the options name, cut to their iterations."""
    options = Options()
    options["unsafe_pickle"] = arguments.unsafe_pickle
    for name in ("unit", "num_experts", "experts_per_token"):
        value = getattr(arguments, name)
        if value is not None:
            options[name] = value
    if arguments.active_load_balancer is not None:
        if arguments.recorded_ep_size is None:
            raise ValueError("--active-load-balancer needs --recorded-ep-size, its number of ranks")
        options["active_placement"] = load_placement(
            arguments.active_load_balancer,
            num_ranks=arguments.recorded_ep_size,
            num_experts=arguments.num_experts,
            unsafe_pickle=arguments.unsafe_pickle,
        )
    recording = load_recording(Path(arguments.recording), **options)
    recording = recording.between(arguments.iter_start, arguments.iter_stop)
    if arguments.min_tokens:
        recording = recording.with_at_least(arguments.min_tokens)
    return recording


def add_recording_options(
    parser: argparse.ArgumentParser,
    metavar: str = "RECORDING",
    description: str = "a directory of TensorRT-LLM's statistics, or a .npz, .safetensors, .npy, "
    ".pt or .json file",
) -> None:
    """The options that `read_recording` reads, first of all the path."""
    parser.add_argument("recording", metavar=metavar, help=description)
    parser.add_argument("--iter-start", type=whole, metavar="N", help="first iteration to use")
    parser.add_argument("--iter-stop", type=whole, metavar="N", help="first iteration not to use")
    parser.add_argument(
        "--min-tokens", type=whole, default=0, metavar="N", help="leave out smaller iterations"
    )
    parser.add_argument(
        "--unit",
        choices=("experts", "slots"),
        help="what the counts count, where the file does not say",
    )
    parser.add_argument(
        "--num-experts", type=positive, metavar="E", help="where the file does not say"
    )
    parser.add_argument(
        "--experts-per-token", type=positive, metavar="K", help="where the file does not say"
    )
    parser.add_argument(
        "--active-load-balancer",
        metavar="FILE",
        help="the load balancer file in force while slots were counted",
    )
    parser.add_argument(
        "--recorded-ep-size", type=positive, metavar="P", help="ranks of --active-load-balancer"
    )
    parser.add_argument(
        "--unsafe-pickle",
        action="store_true",
        help="read a pickled .npy file, SGLang-JAX's; pickles can run code, so only from those "
        "whom you trust",
    )


def whole(text: str) -> int:
    """An integer of 0 or more, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def option_name(name: str) -> str:
    """An option as it is typed.

    >>> option_name("ep_size")
    '--ep-size'
    """
    return f"--{name.replace('_', '-')}"


def parse_integers(text: str) -> list[int]:
    """Integers of 0 or more: "3,61".

    >>> parse_integers("3,61")
    [3, 61]
    """
    return [whole(part) for part in text.split(",")]


def parse_numbers(text: str) -> list[float]:
    """Numbers of any kind: "1,0.5".

    >>> parse_numbers("1,0.5")
    [1.0, 0.5]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None


def parse_moves(text: str) -> list[int | None]:
    """Limits of moves, None for all: "0,8,all".

    >>> parse_moves("0,8,all")
    [0, 8, None]
    """
    return [None if part == "all" else whole(part) for part in text.split(",")]


def parse_range(text: str) -> tuple[int, int | None]:
    """A half-open range of iterations: "100-200", or "100-" for all from 100.

    >>> parse_range("100-200"), parse_range("5-")
    ((100, 200), (5, None))
    """
    start, dash, stop = text.partition("-")
    if not (dash and start.isdecimal() and (stop.isdecimal() or not stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 100-200")
    if stop and int(stop) <= int(start):
        raise argparse.ArgumentTypeError(f"{text!r} is empty; the end is not included")
    return int(start), int(stop) if stop else None


def parse_layers(text: str) -> list[int]:
    """Layer ids of 0 or more: "3-60" for all from 3 to 60, "0,2-4".

    >>> parse_layers("0,2-4")
    [0, 2, 3, 4]
    """
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ends = whole(first), whole(last or first)
        if ends[1] - ends[0] > _MAX_LAYERS:
            raise argparse.ArgumentTypeError(f"{part!r} are more than {_MAX_LAYERS} layers")
        layers += range(ends[0], ends[1] + 1)
    if not layers:
        raise argparse.ArgumentTypeError(f"{text!r} names no layer")
    return layers
