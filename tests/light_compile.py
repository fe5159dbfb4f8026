"""Programs compiled with few optimisations: two thirds of the time, for what compares no bits.

Compiling is most of the time that the tests take. What must agree bit for bit between programs (the
kernels, the exchange, the layer, the decoder) is tested as it is used, fully optimised; what makes
such a test's weights, and the planner, whose results are checked by value, need not be.
"""

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"
# For a process that a test starts.
LIGHT_ENVIRONMENT = {_FLAG.upper(): "1"}


def is_light() -> bool:
    return jax.config.read(_FLAG)


def set_light(light: bool) -> None:
    jax.config.update(_FLAG, light)


@contextlib.contextmanager
def light_compile() -> Iterator[None]:
    """What is compiled first inside the block is compiled lightly, and stays so."""
    before = is_light()
    set_light(True)
    try:
        yield
    finally:
        set_light(before)
