import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.checkpoint import TrainingCheckpoints


def state_of(value, ranks):
    mesh = expert_mesh(ranks)
    bank = jax.device_put(
        jnp.full((8, 3), value) + jnp.arange(3.0)[None], NamedSharding(mesh, P("expert"))
    )
    count = jax.device_put(jnp.int32(value), NamedSharding(mesh, P()))
    return {"bank": bank, "nested": (count,)}


def test_without_a_checkpoint_the_state_given_is_the_first(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path / "run")
    state = state_of(1, 2)
    step, found = checkpoints.restore_latest(state)
    checkpoints.close()
    assert step == 0
    assert found is state


def test_the_latest_state_is_restored_onto_another_mesh(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path / "run", keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, state_of(step, 4))
    checkpoints.close()
    assert sorted(int(x.name) for x in (tmp_path / "run").iterdir()) == [10, 15]
    again = TrainingCheckpoints(tmp_path / "run")
    like = state_of(0, 2)
    step, found = again.restore_latest(like)
    again.close()
    assert step == 15
    np.testing.assert_array_equal(found["bank"], state_of(15, 1)["bank"])
    assert found["nested"][0] == 15
    assert found["bank"].sharding == like["bank"].sharding
