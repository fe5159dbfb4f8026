"""`lax.ragged_all_to_all` for CPU, which has none: the same rows moved, by an all-gather."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What each source sends this rank, at the offset that the source names; else `output`."""
    rank = jax.lax.axis_index(axis_name)
    rows, starts, sizes, ends = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    starts, sizes, ends = starts[:, rank], sizes[:, rank], ends[:, rank]  # [P], by source
    turn = jnp.arange(len(output), dtype=jnp.int32)[None] - ends[:, None]  # [P, M]
    here = (turn >= 0) & (turn < sizes[:, None])
    # A receiver that expects another size than is sent would hang, or read what nobody wrote.
    matches = sizes == recv_sizes
    source = here.argmax(axis=0)
    index = jnp.clip(starts[source] + turn[source, jnp.arange(len(output))], 0, rows.shape[1] - 1)
    use = (here & matches[:, None]).any(axis=0).reshape(-1, *(1,) * (operand.ndim - 1))
    return jnp.where(use, rows[source, index], output)
