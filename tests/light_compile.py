"""Programs compiled with few optimisations: two thirds of the time, for what compares no bits.

Compiling is most of the time that the tests take. What must agree bit for bit between programs (the
kernels, the exchange, the layer, the decoder) is tested as it is used, fully optimised; what makes
such a test's weights, and the planner, whose results are checked by value, need not be.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import compiler

_FLAG = "jax_disable_most_optimizations"
# The XLA of jaxlib 0.10 has two code generators for the CPU. The older one compiles faster by half,
# but where a row lies in an array may then change its last bit.
_OLDER = {"xla_cpu_use_fusion_emitters": False} if jax.__version__.startswith("0.10.") else {}
# For a process that a test starts.
LIGHT_ENVIRONMENT = {_FLAG.upper(): "1"}
LIGHT_XLA_FLAGS = " ".join(f"--{name}=false" for name in _OLDER)


def is_light() -> bool:
    return jax.config.read(_FLAG)


def _with_older_generator(get_compile_options: Any) -> Any:
    """JAX passes options of XLA on for single functions only, and not for all."""

    def get(*arguments, env_options_overrides=None, **others):
        if is_light():
            env_options_overrides = (env_options_overrides or {}) | _OLDER
        return get_compile_options(
            *arguments, env_options_overrides=env_options_overrides, **others
        )

    return get


compiler.get_compile_options = _with_older_generator(compiler.get_compile_options)


def set_light(light: bool) -> None:
    jax.config.update(_FLAG, light)


@contextlib.contextmanager
def light_compile(light: bool = True) -> Iterator[None]:
    """What is compiled first inside the block is compiled lightly, or not, and stays so."""
    before = is_light()
    set_light(light)
    try:
        yield
    finally:
        set_light(before)
