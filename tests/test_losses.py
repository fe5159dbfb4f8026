import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.routing.losses import (
    balance,
    load_balancing_loss,
    masked_mean,
    normalized_scores,
    router_z_loss,
    sequence_balance_loss,
    top_k_counts,
    update_selection_bias,
)

pytestmark = pytest.mark.light_compile

T, E, K = 10, 6, 2


# Compiled whole: one operation after another, each would be a program of its own. Their arguments
# are made by numpy for the same reason.
balance = jax.jit(balance)
masked_mean = jax.jit(masked_mean)
normalized_scores = jax.jit(normalized_scores, static_argnums=1)
top_k_counts = jax.jit(top_k_counts, static_argnums=1)
update_selection_bias = jax.jit(update_selection_bias)
load_balancing_loss = jax.jit(load_balancing_loss, static_argnums=1)
sequence_balance_loss = jax.jit(sequence_balance_loss, static_argnums=1, static_argnames="scores")
router_z_loss = jax.jit(router_z_loss)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def loss_by_numpy(scores, choices):
    """Equations 18 to 20 of DeepSeek-V3's paper for the scores [T, E] of one sequence."""
    total = 0.0
    for e in range(scores.shape[1]):
        chosen = sum(e in np.argsort(-s, kind="stable")[:choices] for s in scores)
        f = scores.shape[1] / (choices * len(scores)) * chosen
        total += f * np.mean([s[e] / s.sum() for s in scores])
    return total


def test_the_balance_is_one_where_all_share_alike_and_e_where_one_has_all():
    third, none = np.eye(E, dtype=np.float32)[2], np.zeros(E, np.float32)
    assert float(balance(np.full(E, 3), none + np.float32(1 / E))) == pytest.approx(1)
    assert float(balance(np.int32(9 * third), third)) == E
    assert float(balance(np.int32(none), none)) == 0


def test_the_balance_has_a_layer_for_each_row():
    tokens, scores = np.array([[4, 0], [2, 2]]), np.full((2, 2), [0.75, 0.25], np.float32)
    assert balance(tokens, scores).tolist() == [1.5, 1.0]


def test_the_gradient_of_the_balance_weighs_scores_by_how_busy_the_expert_is():
    tokens = np.array([3, 0, 1])
    gradient = jax.jit(jax.grad(balance, argnums=1))(tokens, np.full(3, 1 / 3, np.float32))
    np.testing.assert_allclose(gradient, 3 * np.array([0.75, 0, 0.25]), rtol=1e-6)


def test_the_load_balancing_loss_pools_layers_and_leaves_padding_out():
    logits, mask = drawn(3, T, E), np.arange(T) % 3 > 0
    pooled = softmax(logits[:, mask].reshape(-1, E))
    expected = K * loss_by_numpy(pooled, K)
    assert float(load_balancing_loss(logits, K, mask)) == pytest.approx(expected, rel=1e-5)
    flat = logits[:, mask].reshape(-1, E)
    assert float(load_balancing_loss(flat, K)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("scores", "function"), [("sigmoid", sigmoid), ("softmax", softmax)])
def test_the_sequence_loss_is_the_papers(scores, function):
    logits = drawn(3, T, E, seed=1)
    expected = np.mean([loss_by_numpy(function(one), K) for one in logits])
    found = sequence_balance_loss(logits, K, scores=scores)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_sequence_loss_leaves_padding_and_empty_sequences_out():
    logits, mask = drawn(3, T, E, seed=2), np.ones((3, T), bool)
    mask[0, 4:] = mask[1] = False
    short, whole = loss_by_numpy(sigmoid(logits[0, :4]), K), loss_by_numpy(sigmoid(logits[2]), K)
    found = float(sequence_balance_loss(logits, K, mask))
    assert found == pytest.approx((short + whole) / 2, rel=1e-5)


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    logits, mask = drawn(2, T, E, seed=3), np.arange(T) < 7
    squares = np.logaddexp.reduce(logits.astype(np.float64), axis=2) ** 2  # [2, T]
    np.testing.assert_allclose(router_z_loss(logits), squares.mean(axis=1), rtol=1e-5)
    by_layer = router_z_loss(logits, np.stack([mask, mask]))
    np.testing.assert_allclose(by_layer, squares[:, mask].mean(axis=1), rtol=1e-5)


LOSSES = {
    "load_balancing": lambda logits, mask: load_balancing_loss(logits, K, mask),
    "sequence_balance": lambda logits, mask: sequence_balance_loss(logits[None], K, mask[None]),
    "router_z": router_z_loss,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_padding_has_no_gradient_and_no_tokens_no_loss(loss):
    run = jax.jit(jax.value_and_grad(loss))
    mask = np.arange(T) < 6
    logits = drawn(T, E, seed=4)
    value, gradient = run(logits, mask)
    assert np.asarray(gradient)[:6].all()
    assert not np.asarray(gradient)[6:].any()
    assert float(loss(logits[:6], mask[:6])) == pytest.approx(float(value), rel=1e-5)
    assert float(loss(logits[:0], mask[:0])) == 0
    # What stands in the padding, and how much of it, changes nothing.
    logits[6:] = 9
    other, _ = run(logits, mask)
    assert float(other) == float(value)
    value, gradient = run(logits, np.zeros(T, bool))
    assert float(value) == 0
    assert not np.asarray(gradient).any()


@each_loss
def test_the_gradients_are_the_finite_differences_with_the_choice_held(loss):
    ranks = np.random.default_rng(5).permuted(np.tile(np.arange(E), (T, 1)), axis=1)
    logits, mask = ranks.astype(np.float32) / 2, np.arange(T) != 2
    direction = drawn(T, E, seed=6)
    run = jax.jit(jax.value_and_grad(loss))
    _, gradient = run(logits, mask)
    step = np.float32(1e-2)  # too short to change a choice, long enough for float32
    sides = [float(run(logits + sign * step * direction, mask)[0]) for sign in (1, -1)]
    slope = (sides[0] - sides[1]) / (2 * float(step))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-4)


@each_loss
def test_descending_a_loss_lowers_it(loss):
    mask, logits = np.ones(T, bool), drawn(T, E, seed=7)
    run = jax.jit(jax.value_and_grad(loss))
    before, gradient = run(logits, mask)
    after, _ = run(logits - np.float32(0.05) * np.asarray(gradient), mask)
    assert float(after) < float(before)


def test_sums_over_ranks_give_the_loss_of_all_their_tokens():
    logits, mask = drawn(4 * T, E, seed=8), np.arange(4 * T) % 5 > 1

    def local(logits, mask):
        scores = jnp.where(mask[:, None], normalized_scores(logits), 0).sum(axis=0)
        counts = top_k_counts(logits, K, mask)
        scores, counts, tokens = jax.lax.psum((scores, counts, mask.sum()), "expert")
        return K * balance(counts, scores / tokens.astype(jnp.float32))

    axis = P("expert")
    run = jax.shard_map(local, mesh=expert_mesh(4), in_specs=(axis, axis), out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(run))(logits, mask)
    of_all = jax.jit(jax.value_and_grad(load_balancing_loss), static_argnums=1)
    whole, expected = of_all(jnp.asarray(logits), K, mask)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_counts_are_numpys_and_leave_padding_out():
    logits, mask = drawn(2, T, E, seed=9), np.arange(2 * T).reshape(2, T) % 4 > 0
    best = np.argsort(-logits, axis=2)[..., :K]
    expected = [np.bincount(best[i][mask[i]].ravel(), minlength=E) for i in range(2)]
    np.testing.assert_array_equal(top_k_counts(logits, K, mask), expected)


def test_scores_too_small_for_float32_are_normalized_all_the_same():
    scores = normalized_scores(np.array([[-300, -301, -400]], np.float32), "sigmoid")
    np.testing.assert_allclose(scores, softmax([[0, -1, -100]]), rtol=1e-5, atol=1e-30)
    with pytest.raises(ValueError, match="scores is 'relu'; choose 'softmax' or 'sigmoid'"):
        normalized_scores(np.zeros((1, 2), np.float32), "relu")


@pytest.mark.slow
def test_narrow_logits_are_weighed_in_float32():
    logits, mask = drawn(T, E).astype(jnp.bfloat16), np.ones(T, bool)
    for loss in LOSSES.values():
        value = loss(logits, mask)
        assert value.dtype == jnp.float32
        assert float(value) == float(loss(logits.astype(np.float32), mask))


def test_the_mean_is_over_real_tokens():
    values = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    mask = np.array([[1, 0, 1], [0, 0, 0]], bool)
    assert masked_mean(values, mask).tolist() == [[1.0], [0.0]]
    assert masked_mean(values).tolist() == [[1.0], [4.0]]


def test_the_bias_moves_by_the_rate_towards_the_mean_in_every_layer():
    bias = np.array([[0, 0.5, 1], [0, 0, 0]], np.float32)
    tokens = np.array([[3, 4, 5], [1, 1, 2]])
    moved = update_selection_bias(bias, tokens, 0.25)
    assert moved.tolist() == [[0.25, 0.5, 0.75], [0.25, 0.25, -0.25]]
    assert moved.dtype == bias.dtype


@given(tokens=arrays(np.int32, E, elements=st.integers(0, 2**28)))
def test_the_bias_rule_compares_with_the_exact_mean(tokens):
    # Float32 would merge a count with a mean that is a fraction away.
    total = sum(map(int, tokens))
    direction = [(total > E * int(count)) - (total < E * int(count)) for count in tokens]
    moved = update_selection_bias(np.zeros(E, np.float32), tokens, 1.0)
    assert moved.tolist() == direction


def test_the_bias_rule_evens_out_a_skewed_router():
    rng = np.random.default_rng(0)
    merits = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(512, E)) + np.arange(E) / 2, jnp.float32))

    def step(bias, _):
        tokens = top_k_counts(merits + bias[None], K)
        return update_selection_bias(bias, tokens, 0.005), tokens.max()

    _, hottest = jax.lax.scan(step, jnp.zeros(E), None, length=200)
    assert int(hottest[0]) > 1.8 * 512 * K / E
    assert int(hottest[-1]) < 1.1 * 512 * K / E
