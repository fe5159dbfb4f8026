"""Several processes that work together, as on several machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.light_compile import LIGHT_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]


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
            env=os.environ | LIGHT_ENVIRONMENT,
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
