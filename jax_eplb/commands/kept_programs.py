"""Compiled programs, kept between calls of the command line: compiling is most of a plan's time."""

import os
import platform
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keep them in the user's cache folder, each machine its own: programs fit one kind of CPU.

    JAX's own settings come first: `JAX_COMPILATION_CACHE_DIR` for another folder,
    `JAX_ENABLE_COMPILATION_CACHE=false` for none. Where the folder cannot be made nothing is kept.
    """
    if (
        jax.config.values["jax_compilation_cache_dir"]
        or not jax.config.values["jax_enable_compilation_cache"]
    ):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "jax_eplb" / (platform.node() or "programs")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
