import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from jax_eplb.kernels import by_row_blocks
from jax_eplb.routing.router import RouterConfig, choose, route, within_best_groups
from tests.light_compile import light_compile

pytestmark = pytest.mark.light_compile

E, K = 12, 4
V3 = RouterConfig(
    "sigmoid",
    selection_bias=True,
    num_groups=4,
    groups_per_token=2,
    group_score="top_2_sum",
    scaling_factor=2.5,
)
CONFIGS = {
    "mixtral": RouterConfig(),
    "olmoe": RouterConfig(renormalize=False),
    "deepseek_v2": RouterConfig(
        renormalize=False, num_groups=4, groups_per_token=2, scaling_factor=16.0
    ),
    "deepseek_v3": V3,
    "gpt_oss": RouterConfig("softmax_of_top_k", logits_bias=True),
    "softmax with a bias": RouterConfig(selection_bias=True),
    "softmax in pairs of groups": RouterConfig(
        num_groups=3, groups_per_token=2, group_score="top_2_sum"
    ),
    "sigmoid alone": RouterConfig("sigmoid", renormalize=False),
    "sigmoid in the best group": RouterConfig("sigmoid", num_groups=3),
    "logits with a bias, in groups": RouterConfig(
        "softmax_of_top_k", selection_bias=True, num_groups=2, group_score="top_2_sum"
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def bias_of(config, size=E):
    if not config.selection_bias:
        return None
    return jnp.asarray(np.random.default_rng(7).normal(size=size) * 0.5, jnp.float32)


def merits_by_numpy(logits, config, bias):
    """float64[T, E]: what chooses, before groups."""
    by_name = {
        "softmax": lambda x: np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)),
        "sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)),
        "softmax_of_top_k": lambda x: x,
    }
    scores = by_name[config.scores](np.asarray(logits, np.float64))
    return scores if bias is None else scores + np.asarray(bias, np.float64)


def groups_by_numpy(merits, config):
    """float64[T, G]: how good each group is."""
    ranked = np.sort(merits.reshape(len(merits), config.num_groups, -1), axis=2)
    return ranked[..., -1] if config.group_score == "max" else ranked[..., -2:].sum(axis=2)


def weights_by_numpy(logits, experts, config):
    """float64[T, K], by the formula of the papers: scores, quotient, factor."""
    logits = np.asarray(logits, np.float64)
    scores = np.exp(-np.logaddexp(0, -logits))
    if config.scores != "sigmoid":
        scores = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    weights = np.take_along_axis(scores, np.asarray(experts), axis=1)
    if config.renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return weights * config.scaling_factor


def experts_by_numpy(logits, choices, config, bias):
    """int[T, K], one token and one group at a time; lowest first among equals."""
    merits = merits_by_numpy(logits, config, bias)
    size = merits.shape[1] // config.num_groups
    chosen = []
    for merit, good in zip(merits, groups_by_numpy(merits, config), strict=True):
        groups = np.argsort(-good, kind="stable")[: config.groups_per_token]
        allowed = sorted(e for g in groups for e in range(g * size, g * size + size))
        chosen.append(sorted(allowed, key=lambda e: -merit[e])[:choices])
    return np.array(chosen).reshape(len(merits), choices)


@functools.cache
def routed(config, choices=K):
    return jax.jit(lambda logits: route(logits, choices, config, bias_of(config)))


@each_config
@pytest.mark.parametrize("choices", [pytest.param(1, marks=pytest.mark.slow), K])
def test_the_router_agrees_with_numpy(config, choices):
    logits = np.random.default_rng(choices).normal(size=(40, E)).astype(np.float32) * 2
    routes = routed(config, choices)(logits)
    expected = experts_by_numpy(logits, choices, config, bias_of(config))
    np.testing.assert_array_equal(routes.experts, expected)
    weights = weights_by_numpy(logits, expected, config)
    np.testing.assert_allclose(routes.weights, weights, rtol=1e-5)


# Whole numbers, so that experts, and groups, often tie.
whole_logits = arrays(np.float32, (3, E), elements=st.integers(-30, 30).map(float))


@pytest.mark.slow
@each_config
@given(logits=whole_logits)
def test_the_chosen_are_the_best_of_the_best_groups(config, logits):
    experts, weights = (np.asarray(x) for x in routed(config)(logits))
    merits = merits_by_numpy(logits, config, bias_of(config))
    good = groups_by_numpy(merits, config)
    size = E // config.num_groups
    for t in range(len(logits)):
        assert len(set(experts[t])) == K
        groups = set(experts[t] // size)
        assert len(groups) <= config.groups_per_token
        mine = merits[t, experts[t]]
        assert (np.diff(mine) <= 1e-5).all()
        # Better experts that were passed over sit in groups no better than those that won.
        for e in set(range(E)) - set(experts[t]):
            if merits[t, e] > mine[-1] + 1e-5:
                assert e // size not in groups
                assert good[t, e // size] <= min(good[t, list(groups)]) + 1e-5
    expected = weights_by_numpy(logits, experts, config)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-30)
    if config.renormalize:
        np.testing.assert_allclose(weights.sum(axis=1), config.scaling_factor, rtol=1e-5)


def test_weights_are_the_softmax_over_all_experts_unless_renormalised():
    logits = jnp.log(jnp.array([[1.0, 6.0, 3.0], [5.0, 1.0, 4.0]]))
    plain = route(logits, 2, RouterConfig(renormalize=False))
    assert plain.experts.tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(plain.weights, [[0.6, 0.3], [0.5, 0.4]], rtol=1e-6)
    weights = route(logits, 2, RouterConfig()).weights
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [5 / 9, 4 / 9]], rtol=1e-6)
    # The softmax of the chosen logits is the renormalised softmax of all.
    of_top_k = route(logits, 2, RouterConfig("softmax_of_top_k")).weights
    np.testing.assert_array_equal(of_top_k, weights)


def test_the_selection_bias_chooses_and_does_not_weigh():
    scores = jnp.array([[0.2, 0.5, 0.6, 0.9]])
    logits = jnp.log(scores / (1 - scores))
    config = RouterConfig("sigmoid", selection_bias=True, scaling_factor=2.5)
    routes = route(logits, 2, config, jnp.array([0.75, 0.0, 0.0, -0.5]))
    assert routes.experts.tolist() == [[0, 2]]  # 0.95 and 0.6, before 0.5 and 0.4
    np.testing.assert_allclose(routes.weights, [[2.5 * 0.2 / 0.8, 2.5 * 0.6 / 0.8]], rtol=1e-6)


def test_groups_are_judged_by_their_best_or_by_their_best_two():
    merits = jnp.array([[9.0, 0, 0, 5, 5, 1, 6, 2, 2]])
    by = functools.partial(RouterConfig, num_groups=3, groups_per_token=2)
    assert choose(merits, 3, by(group_score="max")).tolist() == [[0, 6, 7]]
    config = by(scores="softmax_of_top_k", group_score="top_2_sum")
    assert choose(merits, 3, config).tolist() == [[0, 3, 4]]


def test_experts_of_other_groups_never_slip_in():
    # The best group wins by expert 0; its others are negative, and 0 as a mask would beat them.
    merits = jnp.array([[3.0, -2, -1, 0.5, 0.5, 0.5]])
    config = RouterConfig("softmax_of_top_k", num_groups=2)
    assert choose(merits, 3, config).tolist() == [[0, 2, 1]]
    # Softmax scores that vanish are 0 too.
    assert choose(merits * 200, 3, RouterConfig(num_groups=2)).tolist() == [[0, 2, 1]]
    sigmoid = RouterConfig("sigmoid", selection_bias=True, num_groups=2)
    bias = jnp.array([2.0, -2, -2, 0, 0, 0])
    assert choose(merits, 3, sigmoid, bias).tolist() == [[0, 2, 1]]


@pytest.mark.slow
@each_config
def test_ties_go_to_the_lowest_expert_of_the_lowest_group(config):
    bias = jnp.zeros(E) if config.selection_bias else None
    last_but_one = jnp.zeros(E).at[E - 2].set(1)
    run = jax.jit(lambda logits: choose(logits, 3, config, bias))
    equal, one_better = run(jnp.stack([jnp.zeros(E), last_but_one])).tolist()
    assert equal == [0, 1, 2]
    # The group of the best, where only one may be chosen from.
    alone = config.num_groups > 1 == config.groups_per_token
    first = E - E // config.num_groups if alone else 0
    assert one_better == [E - 2, first, first + 1]


def test_logits_decide_where_their_scores_round_to_ties():
    far = jnp.array([[-300.0, -200, 0]])  # softmax 0, 0, 1
    assert choose(far, 2, RouterConfig()).tolist() == [[2, 1]]
    high = jnp.array([[40.0, 50, 60]])  # sigmoid 1, 1, 1
    assert choose(high, 2, RouterConfig("sigmoid")).tolist() == [[2, 1]]


@pytest.mark.parametrize("config", [CONFIGS["mixtral"], CONFIGS["gpt_oss"]])
def test_large_logits_do_not_overflow(config):
    weights = route(jnp.array([[1e4, -1e4, 1e4 - 1]]), 2, config).weights
    np.testing.assert_allclose(weights, jax.nn.softmax(jnp.array([[1.0, 0.0]])), rtol=1e-6)


def test_scores_too_small_for_float32_still_weigh_and_learn():
    logits, config = jnp.array([[-301.0, -300, -400]]), RouterConfig("sigmoid")
    softmax = jax.nn.softmax(jnp.array([0.0, -1]))
    np.testing.assert_allclose(route(logits, 2, config).weights[0], softmax, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: route(x, 2, config).weights[0, 0]))(logits)
    slope = softmax[0] * softmax[1]
    np.testing.assert_allclose(gradient, [[-slope, slope, 0]], rtol=1e-4)


@pytest.mark.slow
@each_config
def test_the_gradient_of_the_weights_is_the_slope_of_the_formula(config):
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(6, E))
    counts = generator.normal(size=(6, K))
    run = routed(config)
    experts = run(jnp.asarray(logits, jnp.float32)).experts
    found = jax.grad(lambda x: (run(x).weights * jnp.asarray(counts, jnp.float32)).sum())(
        jnp.asarray(logits, jnp.float32)
    )

    def loss(logits):  # the choice held fixed
        return (weights_by_numpy(logits, experts, config) * counts).sum()

    steps = np.eye(logits.size).reshape(-1, *logits.shape) * 1e-6
    slopes = [(loss(logits + step) - loss(logits - step)) / 2e-6 for step in steps]
    expected = np.reshape(slopes, logits.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * config.scaling_factor)


def test_there_is_no_gradient_through_the_choice():
    logits, bias = jnp.arange(12.0)[None] / 12, bias_of(V3)

    def first_weight(logits, bias):
        routes = route(logits, K, V3, bias)
        return routes.weights[0, 0], routes.experts[0]

    slopes = jax.jit(jax.grad(first_weight, argnums=(0, 1), has_aux=True))
    (by_logits, by_bias), experts = slopes(logits, bias)
    np.testing.assert_array_equal(by_bias, np.zeros(E))
    assert np.flatnonzero(by_logits[0]).tolist() == sorted(experts.tolist())


@pytest.mark.parametrize("config", [CONFIGS["olmoe"], V3], ids=["olmoe", "deepseek_v3"])
def test_a_row_does_not_depend_on_the_others(config):
    logits = np.random.default_rng(3).normal(size=(70, E)).astype(np.float32)
    run = jax.jit(lambda x: by_row_blocks(lambda rows: route(rows, K, config, bias_of(config)), x))
    with light_compile(False):  # bits are compared
        together = run(logits)
        alone = run(logits[33:50])
    np.testing.assert_array_equal(alone.experts, together.experts[33:50])
    np.testing.assert_array_equal(alone.weights, together.weights[33:50])


@pytest.mark.slow
@each_config
def test_narrow_logits_are_routed_in_float32_and_no_tokens_give_none(config):
    logits = np.random.default_rng(4).normal(size=(3, E)).astype(jnp.bfloat16)
    routes = routed(config)(logits)
    assert routes.weights.dtype == jnp.float32
    wide = routed(config)(logits.astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, routes, wide)
    nothing = routed(config)(logits[:0])
    assert nothing.experts.shape == nothing.weights.shape == (0, K)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scores": "relu"}, "scores is 'relu'; choose one of .*'sigmoid'"),
        ({"group_score": "sum"}, "group_score is 'sum'; choose one of .*'top_2_sum'"),
        ({"scores": "softmax_of_top_k", "renormalize": False}, "always sum to 1; use"),
        ({"num_groups": 0}, "num_groups is 0; use 1 for no groups"),
        ({"groups_per_token": 2}, "groups_per_token is 2; .* between 1 and num_groups, 1"),
        ({"num_groups": 4, "groups_per_token": 0}, "groups_per_token is 0; .* num_groups, 4"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0; use a positive number"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan; use a positive number"),
    ],
)
def test_a_config_without_meaning_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**keywords)


@pytest.mark.parametrize(
    ("config", "choices", "message"),
    [
        (RouterConfig(), 13, "experts_per_token is 13; .* number of experts, 12"),
        (RouterConfig(), 0, "experts_per_token is 0; .* between 1"),
        (RouterConfig(num_groups=5), 1, "12 experts do not divide into num_groups=5"),
        (
            RouterConfig(num_groups=4, groups_per_token=2),
            7,
            "experts_per_token=7 among groups_per_token=2 groups of 3 experts; .* at least 3",
        ),
        (
            RouterConfig(num_groups=12, group_score="top_2_sum"),
            1,
            "a group is 1 of 12 experts, and 'top_2_sum' takes 2; use num_groups of at most 6",
        ),
    ],
)
def test_sizes_that_cannot_be_routed_are_refused(config, choices, message):
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((1, E)), choices, config)
    with pytest.raises(ValueError, match=message):
        config.check_sizes(E, choices)


@pytest.mark.parametrize(
    ("config", "bias", "message"),
    [
        (RouterConfig(), np.zeros(E), r"bias is given, of \(12,\), but .* is False"),
        (V3, None, "bias is missing, but RouterConfig.selection_bias is True"),
        (V3, np.zeros(E - 1), r"of shape \(11,\); it takes one value for each of the 12 experts"),
    ],
)
def test_a_selection_bias_that_does_not_fit_is_refused(config, bias, message):
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((1, E)), 2, config, bias)


def test_masked_groups_are_minus_infinity():
    merits = jnp.array([[1.0, 0, 5, 5, 2, 2]])
    masked = within_best_groups(merits, RouterConfig(num_groups=3, groups_per_token=2))
    assert masked.tolist() == [[-np.inf, -np.inf, 5, 5, 2, 2]]
