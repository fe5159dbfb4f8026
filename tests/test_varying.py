import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.kernels.varying import zeros_varying_like


def test_outside_shard_map_they_are_plain_zeros():
    zeros = zeros_varying_like((2, 3), jnp.int32, jnp.ones(4))
    np.testing.assert_array_equal(zeros, np.zeros((2, 3)))
    assert zeros.dtype == jnp.int32


def test_inside_shard_map_they_can_carry_what_differs_between_devices():
    def local(x, same):
        assert not jax.typeof(zeros_varying_like((), x.dtype, same)).manual_axis_type.varying
        start = zeros_varying_like((), x.dtype, same, x)
        return jax.lax.fori_loop(0, 3, lambda i, total: total + x[0], start)[None]

    run = jax.shard_map(
        local, mesh=expert_mesh(4), in_specs=(P("expert"), P()), out_specs=P("expert")
    )
    np.testing.assert_array_equal(run(jnp.arange(4), jnp.ones(2)), [0, 3, 6, 9])
