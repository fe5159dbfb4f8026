"""What the kernels in Triton's terms share: sizes of tiles, and what threads tell each other."""

from jax import numpy as jnp
from jax.experimental.pallas import triton as plgpu

LONGEST = 4096  # entries of a vector; more would not fit the registers of a program


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller: tiles have no other sizes.

    >>> [power_of_two(n) for n in (1, 4, 5)]
    [1, 4, 8]
    """
    return 1 << (size - 1).bit_length()


def load(ref, index, mask, *row):
    """Entries of a row, or of what has one alone; 0 where the mask is False."""
    return plgpu.load(ref.at[*row, jnp.where(mask, index, 0)], mask=mask, other=0)


def segment(ends_ref, index, mask, begin, count: int):
    """Which of `count` segments, from `begin` on, an index lies in; `begin + count` past them."""
    found, step = jnp.zeros_like(index), 2 * power_of_two(count)
    while step := step // 2:
        last = found + (step - 1)
        inside = mask & (last < count)
        ended = inside & (load(ends_ref, begin + last, inside) <= index)
        found = found + jnp.where(ended, step, 0)
    return begin + found


def wait(interpret: bool) -> None:
    """Until all threads of the program have stored what others of it are to read."""
    if not interpret:
        plgpu.debug_barrier()
