"""Several processes that work together, as on several machines."""

import os
import socket
import subprocess
import sys
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


def run_together(module: str, processes: int, *arguments, timeout: float = 120) -> list[str]:
    """Run `module PROCESS PROCESSES PORT *arguments` in each; what each printed."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (process, processes, port, *arguments))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=light_environment(),
        )
        for process in range(processes)
    ]
    try:
        printed = []
        for process in started:
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
            printed.append(output)
        return printed
    finally:
        for process in started:
            process.kill()
            process.wait()
