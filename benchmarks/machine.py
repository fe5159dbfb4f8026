"""The machine that figures were measured on."""

import os
import platform

import jax
import numpy as np


def describe() -> dict[str, object]:
    """Processor, cores, versions and device; no dates and no names of machines."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": f"{jax.default_backend()}, {jax.devices()[0].device_kind}",
    }


def load_average() -> float | None:
    """Processes that wanted a core, the mean of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
