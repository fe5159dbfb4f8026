"""Planners of other engines, to compare with: each in a process and Python environment of its own.

    --peer flashlb=policy_flashlb.py --peer vllm=default.py --peer-python /elsewhere/bin/python

Their sources are no part of this project: fetch a file, and name it. `KINDS` says which.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks import peer_process

KINDS = {
    "deepseek": "DeepSeek EPLB",  # deepseek-ai/EPLB: eplb.py
    "vllm": "vLLM default",  # vllm-project/vllm: vllm/distributed/eplb/policy/default.py
    "sglang": "SGLang deepseek",  # sgl-project/sglang: .../eplb/eplb_algorithms/deepseek.py
    "snake": "SGLang deepseek_vec",  # the same folder: deepseek_vec.py
    # vllm-project/vllm-ascend: vllm_ascend/eplb/core/policy/policy_{flashlb,swift_balancer}.py
    "flashlb": "FlashLB",
    "flashlb-deep": "FlashLB, depth 8, width 32",
    "swift": "Swift balancer",
}
_START_SECONDS = 120  # importing torch and numba on a busy machine
_LAST_LINES = 5


class PeerError(Exception):
    """A peer cannot be run as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One other planner: its file, and the Python to run it with."""

    kind: str
    path: Path
    python: str = sys.executable

    @property
    def name(self) -> str:
        return KINDS[self.kind]


@dataclasses.dataclass(frozen=True)
class PeerResult:
    """A peer's plan and the time of a warm call; or no table, and `failure` says why."""

    slot_to_expert: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 0), np.int64)
    )  # int64[L, S]
    median_ms: float = float("nan")
    least_ms: float = float("nan")
    failure: str = ""


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"compare with another engine's planner, from its source; {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="[NAME=]PYTHON",
        help="interpreter for all peers, or for one; it needs numpy, torch (FlashLB: numba, scipy)",
    )


def parse_peers(files: Iterable[str], pythons: Iterable[str] = ()) -> list[Peer]:
    """Read the values of `--peer` and `--peer-python`."""
    general: list[str] = [sys.executable]
    own: list[tuple[str, str]] = []
    for text in pythons:
        # A path may contain "=" itself.
        if "=" in text and not shutil.which(text):
            own.append(_named(text, "--peer-python"))
        else:
            general.append(text)
    python_of = dict.fromkeys(KINDS, general[-1]) | dict(own)
    peers: dict[str, Peer] = {}
    for text in files:
        kind, path = _named(text, "--peer")
        if kind in peers:
            raise PeerError(f"--peer {kind}: given twice")
        if not Path(path).is_file():
            raise PeerError(f"--peer {kind}: no file {path}")
        if not shutil.which(python_of[kind]):
            raise PeerError(f"--peer-python: {python_of[kind]} is no program")
        peers[kind] = Peer(kind, Path(path), python_of[kind])
    return list(peers.values())


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in KINDS:
        raise PeerError(f"{option} {text}: write NAME=..., NAME one of {', '.join(KINDS)}")
    return name, value


class Peers(contextlib.AbstractContextManager):
    """Run peers. A process starts on entry, serves all calls, and again after it has died.

    `threads` limits those of torch and of the libraries under it; all cores if left out. An access
    out of bounds (FlashLB has some) is an error instead of a random plan, unless `check_bounds` is
    off: checks cost numba time.
    """

    def __init__(
        self, peers: Iterable[Peer], threads: int | None = None, *, check_bounds: bool = True
    ):
        self._peers = list(peers)
        self._threads = threads
        self._check_bounds = check_bounds
        self._processes: dict[Peer, _Process] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
            for peer in self._peers:
                process = _Process(peer, folder, self._threads, self._check_bounds)
                stack.callback(process.stop)
                process.start()
                self._processes[peer] = process
            self._folder, self._stack = folder, stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.clear()
        self._stack.close()

    def plan_with(
        self,
        peer: Peer,
        load: np.ndarray,
        *,
        num_slots: int,
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
        previous: np.ndarray | None = None,
        keep_history: bool = False,
        repeats: int = 5,
        timeout: float = 600,
    ) -> PeerResult:
        """Plan for loads [L, E], or windows [W, L, E] in time order, and time `repeats` warm calls.

        A planner that does not look at windows gets their sum. FlashLB and the Swift balancer do
        not know groups. `previous`, int[L, S], is the table to replace; without it, slot s has
        expert s mod E. With `keep_history`, FlashLB remembers its own last call, and lets layers
        be that are still good enough. `timeout`, in seconds, is for all calls together, the first
        one's compilation included. A failure of the peer is a result; a peer that cannot start
        raises `PeerError`.
        """
        windows = np.asarray(load) if np.ndim(load) == 3 else np.asarray(load)[None]
        request = {
            "windows": windows,
            "num_slots": num_slots,
            "num_ranks": num_ranks,
            "num_nodes": num_nodes,
            "num_groups": num_groups,
            "keep_history": keep_history,
            "repeats": repeats,
        }
        if previous is not None:
            request["previous"] = np.asarray(previous, np.int64)
        path = self._folder / f"{peer.kind}.npz"
        np.savez(path, **request)
        process = self._processes[peer]
        try:
            reply = process.ask(str(path), timeout)
        except _NoReply as trouble:
            return PeerResult(failure=str(trouble))
        with np.load(reply) as arrays:
            if "failure" in arrays:
                return PeerResult(failure=str(arrays["failure"]))
            table, seconds = arrays["slot_to_expert"], arrays["seconds"]
        fault = _fault_of(table, windows.shape[1], num_slots, windows.shape[2])
        if fault:
            return PeerResult(failure=f"no valid table: {fault}")
        if not repeats:
            return PeerResult(table)
        return PeerResult(table, 1e3 * float(np.median(seconds)), 1e3 * float(seconds.min()))


def _fault_of(table: np.ndarray, num_layers: int, num_slots: int, num_experts: int) -> str:
    """What is wrong with a peer's slot_to_expert; empty if nothing is."""
    if table.shape != (num_layers, num_slots):
        return f"shape {table.shape} in place of {(num_layers, num_slots)}"
    if table.min() < 0 or table.max() >= num_experts:
        layer, slot = np.argwhere((table < 0) | (table >= num_experts))[0]
        return f"layer {layer}, slot {slot}: expert {table[layer, slot]} of {num_experts}"
    missing = ~(table[:, None, :] == np.arange(num_experts)[:, None]).any(axis=-1)  # [L, E]
    if missing.any():
        layer, expert = np.argwhere(missing)[0]
        return f"layer {layer}: expert {expert} has no slot"
    return ""


class _NoReply(Exception):
    """The process died, or took too long."""


class _Process:
    def __init__(self, peer: Peer, folder: Path, threads: int | None, check_bounds: bool):
        self._peer = peer
        self._log = folder / f"{peer.kind}.log"
        self._threads = threads
        self._check_bounds = check_bounds
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        peer, environment = self._peer, dict(os.environ)
        command = [peer.python, peer_process.__file__, peer.kind, str(peer.path)]
        environment["NUMBA_BOUNDSCHECK"] = str(int(self._check_bounds))
        environment["NUMBA_CACHE_DIR"] = str(self._log.parent)
        if self._threads:
            for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
                environment[f"{library}_NUM_THREADS"] = str(self._threads)
        with self._log.open("w") as log:
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        try:
            first = self._read(process, _START_SECONDS)
        except _NoReply as trouble:
            raise PeerError(f"{peer.name} does not start: {trouble}") from trouble
        if first.startswith("missing "):
            self.stop()
            module = first.removeprefix("missing ")
            raise PeerError(
                f"{peer.name}: {peer.python} has no module {module}. Install it there "
                f"({peer.python} -m pip install {module.partition('.')[0]}), or name another "
                f"interpreter: --peer-python {peer.kind}=PYTHON"
            )
        return process

    def ask(self, request: str, timeout: float) -> str:
        """Send one line, return one line."""
        process = self._process or self.start()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{request}\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None
        return self._read(process, timeout)

    def stop(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # `with` closes the pipes; a line that was never sent may not be flushed any more.
            with contextlib.suppress(BrokenPipeError), process:
                process.wait()

    def _read(self, process: subprocess.Popen[str], timeout: float) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            self.stop()
            raise _NoReply(f"no answer in {timeout:g} s")
        line = process.stdout.readline()
        if not line:
            raise self._death(process)
        return line.rstrip("\n")

    def _death(self, process: subprocess.Popen[str]) -> _NoReply:
        """Reap a process that closed its output, and tell its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        code = process.returncode
        self.stop()
        if code is not None and code < 0:
            end = f"died of {signal.Signals(-code).name}"
        else:
            end = f"ended with code {code}"
        with self._log.open(errors="replace") as log:
            last = collections.deque((line.rstrip() for line in log), _LAST_LINES)
        return _NoReply("\n".join([end, *last]))
