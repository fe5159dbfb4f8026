import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb import expert_mesh
from jax_eplb.checkpoint import Checkpoints
from jax_eplb.models import parameters
from jax_eplb.models.training import Trainer, TrainingConfig, corpus, draw
from tests.small_decoder import SMALL, drawn_on_host

pytestmark = pytest.mark.light_compile

# One layer of each sort compiles faster, and one kind of text repeats itself so that it is learnt.
CONFIG = dataclasses.replace(SMALL, num_layers=2)
TRAINING = TrainingConfig(
    seed=0,
    steps=30,
    sequences_per_step=8,
    sequence_length=12,
    learning_rate=1e-2,
    warmup_steps=3,
    final_learning_rate=1e-3,
    weight_decay=0.05,
    clip_norm=1.0,
    balance_loss=1e-3,
    kinds={"count": 0.7, "dice": 0.3},
)
TEXTS = {
    "count": bytes(range(32)) * 20,
    "dice": np.random.default_rng(0).integers(0, 6, 500).astype(np.uint8).tobytes(),
    "unused": b"\x1f" * 100,
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax, and JAX's attention in bfloat16, are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def trainer(ranks):
    made = Trainer(CONFIG, TRAINING, expert_mesh(ranks))
    return made, jax.jit(made.step), made.tables(), corpus(TEXTS, TRAINING, made.mesh)


def first_state(ranks):
    table = np.arange(CONFIG.num_experts)[None]
    mesh = expert_mesh(ranks)
    params = parameters.on_mesh(drawn_on_host(CONFIG), table, CONFIG, mesh, "expert", jnp.float32)
    return params, trainer(ranks)[0].optimizer_state(params)


def trained(ranks, state, first, last):
    """The state after steps first .. last - 1, and the loss of each."""
    _, step_function, tables, text = trainer(ranks)
    nats = []
    for step in range(first, last):
        state, losses = step_function(state, tables, text, jnp.int32(step))
        nats.append(float(losses.nats))
    return state, nats


@functools.cache
def unbroken():
    return trained(4, first_state(4), 0, 15)


@pytest.mark.slow
def test_the_loss_falls():
    _, nats = unbroken()
    assert nats[0] == pytest.approx(np.log(32), rel=0.25)
    assert np.mean(nats[-3:]) < 0.8 * np.mean(nats[:3])


@pytest.mark.slow
def test_one_device_and_four_have_the_same_losses():
    _, one = trained(1, first_state(1), 0, 4)
    np.testing.assert_allclose(one, unbroken()[1][:4], rtol=1e-4)


@pytest.mark.slow
def test_resuming_from_a_checkpoint_changes_no_bit(tmp_path):
    state, _ = trained(4, first_state(4), 0, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, state, trainer(4)[0].placement())
    with Checkpoints(tmp_path) as again:
        restored = again.restore(first_state(4))
    assert restored.step == 8
    state, _ = trained(4, restored.state, restored.step, 15)
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(unbroken()[0]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_state_is_spread_as_the_parameters_are_and_stays_so():
    start, end = first_state(4), unbroken()[0]
    for name in ("mu", "nu"):
        moments = getattr(start[1][1][0], name)
        for own, parameter in zip(jax.tree.leaves(moments), jax.tree.leaves(start[0]), strict=True):
            assert own.sharding == parameter.sharding
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    assert trainer(4)[1]._cache_size() == 1


@functools.cache
def first_losses(dtype):
    made, _, tables, text = trainer(4)
    passages = draw(text, 0, jnp.int32(0), 8, 12)
    run = jax.jit(dataclasses.replace(made, dtype=dtype).losses)
    return run(first_state(4)[0], tables, passages)


@pytest.mark.slow
def test_the_losses_are_of_the_step_before_the_update():
    assert float(first_losses(jnp.float32).nats) == pytest.approx(unbroken()[1][0], rel=1e-5)


@pytest.mark.slow
def test_every_choice_is_counted_and_the_balance_loss_is_near_one_for_an_even_load():
    losses = first_losses(jnp.float32)
    assert losses.expert_tokens.sum(axis=1).tolist() == [8 * 12 * CONFIG.experts_per_token]
    fraction = np.asarray(losses.expert_tokens[0]) / 192
    # Switch Transformer's loss is E · Σ fraction · probability; the router is nearly untrained.
    assert float(losses.balance) == pytest.approx(8 * (fraction**2).sum(), rel=0.5)


@pytest.mark.slow
def test_bfloat16_activations_stay_near_the_float32_loss():
    wide, narrow = first_losses(jnp.float32), first_losses(jnp.bfloat16)
    assert float(narrow.nats) == pytest.approx(float(wide.nats), rel=0.02)


@pytest.mark.slow
def test_weight_decay_spares_the_norms():
    params = drawn_on_host(CONFIG)
    optimizer = TRAINING.optimizer()

    @jax.jit
    def second_update(params):  # the first has a learning rate of zero
        zero = jax.tree.map(jnp.zeros_like, params)
        _, state = optimizer.update(zero, optimizer.init(params), params)
        return optimizer.update(zero, state, params)[0]

    updates = second_update(params)
    changed = {name: bool(np.any(x)) for name, x in parameters.named(updates)}
    assert {name for name, any_change in changed.items() if not any_change} == {
        name for name in changed if name.endswith("norm")
    }


@pytest.mark.slow
def test_passages_are_a_function_of_seed_and_step():
    text = trainer(1)[3]
    drawn = [
        np.asarray(draw(text, seed, jnp.int32(step), 6, 12)).tolist()
        for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]


@pytest.mark.slow
def test_a_passage_is_a_stretch_of_one_kind_of_text_and_kinds_have_their_shares():
    passages = np.asarray(draw(trainer(1)[3], 0, jnp.int32(0), 2000, 12), np.uint8)
    assert passages.shape == (2000, 13)
    kinds = [next(k for k, text in TEXTS.items() if row.tobytes() in text) for row in passages]
    assert kinds.count("count") / 2000 == pytest.approx(0.7, abs=0.05)
    assert "unused" not in kinds


def test_a_kind_without_text_is_refused():
    training = dataclasses.replace(TRAINING, kinds={"count": 0.5, "prose": 0.5})
    with pytest.raises(ValueError, match=re.escape("no text of kind 'prose'; there is ['count'")):
        corpus(TEXTS, training, expert_mesh(1))


def test_a_kind_with_less_than_a_passage_is_refused():
    training = dataclasses.replace(TRAINING, kinds={"short": 1.0})
    length = TRAINING.sequence_length
    with pytest.raises(ValueError, match=f"{length} bytes of kind 'short'; a passage takes"):
        corpus({"short": b"a" * length}, training, expert_mesh(1))


def test_a_schedule_that_ends_while_warming_up_is_refused():
    with pytest.raises(ValueError, match="steps is 3; use more than warmup_steps, 3"):
        dataclasses.replace(TRAINING, steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "'stepz' is unknown"),
        ({"seed": None}, "'seed' is missing"),
    ],
)
def test_a_config_file_with_other_settings_is_refused(change, message):
    values = {**dataclasses.asdict(TRAINING), **change}
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=f"file.yaml: the training setting {message}"):
        TrainingConfig.from_dict(values, "file.yaml")
    with pytest.raises(ValueError, match="must be a mapping"):
        TrainingConfig.from_dict(None, "file.yaml")
