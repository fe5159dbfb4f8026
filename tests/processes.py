"""Several processes that work together, as on several machines."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.light_compile import LIGHT_ENVIRONMENT, LIGHT_XLA_FLAGS

ROOT = Path(__file__).resolve().parents[1]


def light_environment() -> dict[str, str]:
    """This process's environment, for one that is to compile lightly."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {LIGHT_XLA_FLAGS}"
    return os.environ | LIGHT_ENVIRONMENT | {"XLA_FLAGS": flags}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started_together(commands: Iterable[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Python with each of these arguments, at once; none is left at the end."""
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=light_environment(),
        )
        for command in commands
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(started: Iterable[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """What each printed; all must have ended well."""
    printed = []
    for process in started:
        output, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors
        printed.append(output)
    return printed


def run_together(module: str, processes: int, *arguments, timeout: float = 300) -> list[str]:
    """Run `module PROCESS PROCESSES PORT *arguments` in each; what each printed."""
    shared = [*map(str, (processes, free_port(), *arguments))]
    commands = (["-m", module, str(process), *shared] for process in range(processes))
    with started_together(commands) as started:
        return finish(started, timeout)
