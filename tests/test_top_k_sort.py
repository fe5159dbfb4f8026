import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.kernels import top_k_sort
from jax_eplb.kernels.top_k_sort import by_xla, top_k_sort_by_kernels
from tests.gpu_programs import lowered_for_gpu

pytestmark = pytest.mark.light_compile

# T, E, K, tokens of a program: one program, or several.
SHAPES = [
    (1, 1, 1, None),
    (1, 3, 2, None),
    (13, 12, 3, None),
    (13, 12, 1, 4),
    (16, 8, 8, 8),
    (9, 130, 8, None),
    (21, 300, 5, 8),
]


def drawn(shape, seed, padding):
    """Scores that often tie, a mask, and a permutation of the experts."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(-3, 4, shape[:2]).astype(np.float32)
    scores[generator.random(shape[:2]) < 0.1] = -np.inf
    mask = generator.random(shape[0]) >= padding
    return scores, mask, generator.permutation(shape[1]).astype(np.int32)


def by_numpy(scores, mask, rank_of_expert, experts_per_token):
    """One choice at a time."""
    experts = np.argsort(-scores, axis=1, kind="stable")[:, :experts_per_token]
    none = experts.size
    ranks = np.where(mask[:, None], rank_of_expert[experts], len(rank_of_expert)).ravel()
    order, total = np.argsort(ranks, kind="stable"), mask.sum() * experts_per_token
    choice, place = np.full(none, none), np.full(none, none)
    choice[:total] = order[:total]
    place[order[:total]] = np.arange(total)
    counts = np.bincount(experts[mask].ravel(), minlength=len(rank_of_expert))
    sizes = np.zeros_like(counts)
    sizes[rank_of_expert] = counts
    values = np.take_along_axis(scores, experts, axis=1)
    return values, experts, choice, place.reshape(experts.shape), counts, sizes


@functools.cache
def compiled(shape, kernels):
    size, block = shape[2:]
    if kernels:
        interpret = jax.default_backend() == "cpu"
        keywords = {"experts_per_token": size, "block": block, "interpret": interpret}
        return jax.jit(functools.partial(top_k_sort_by_kernels, **keywords))
    return jax.jit(functools.partial(by_xla, experts_per_token=size))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**31), padding=st.sampled_from([0.0, 0.3, 1.0]), permuted=st.booleans())
def test_it_is_numpys_choice_and_order(kernels, shape, seed, padding, permuted):
    scores, mask, rank = drawn(shape, seed, padding)
    found = compiled(shape, kernels)(scores, mask, *([rank] if permuted else []))
    rank = rank if permuted else np.arange(shape[1])
    for got, expected in zip(found, by_numpy(scores, mask, rank, shape[2]), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_the_kernels_rank_any_float_as_top_k_does():
    scores = np.array(
        [[0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -np.nan, -1e-40]] * 2, np.float32
    )
    scores[1] = scores[1, ::-1]
    scores.view(np.int32)[1, 1] = -1  # the least of all
    found, expected = (
        compiled((2, 8, 8, None), k)(scores, np.ones(2, bool)) for k in (True, False)
    )
    np.testing.assert_array_equal(found.experts[0], expected.experts[0])
    np.testing.assert_array_equal(np.sort(found.experts, axis=1), np.arange(8)[None].repeat(2, 0))
    np.testing.assert_array_equal(np.sort(found.choice), np.arange(16))


@pytest.mark.slow
def test_the_values_alone_have_a_gradient():
    scores, mask, rank = drawn((5, 6), 0, 0.3)
    scores = np.where(np.isinf(scores), 0, scores)
    weights = np.arange(1.0, 11, dtype=np.float32).reshape(5, 2)

    def total(scores):
        found = top_k_sort(scores, mask, 2, rank)
        return (found.values * weights).sum() + found.place.sum().astype(jnp.float32), found.experts

    (gradient, experts), slope = jax.grad(total, has_aux=True)(scores), np.ones_like(scores)
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, np.asarray(experts), weights, axis=1)
    np.testing.assert_array_equal(gradient, expected)
    moved = jax.jvp(lambda x: total(x)[0], [jnp.asarray(scores)], [jnp.asarray(slope)])[1]
    assert moved == weights.sum()


@pytest.mark.parametrize("varies", ["scores", "mask", "rank"])
def test_each_device_sorts_its_own(varies):
    scores, mask, rank = drawn((6, 5), 1, 0.3)
    arrays = {"scores": scores, "mask": mask, "rank": rank}
    arrays[varies] = np.stack([arrays[varies], arrays[varies][::-1]])
    each = {"scores": (6, 5), "mask": (6,), "rank": (5,)}

    def local(scores, mask, rank):
        found = top_k_sort(scores.reshape(6, 5), mask.reshape(6), 2, rank.reshape(5))
        return jax.tree.map(lambda x: x[None], found)

    specs = tuple(P("expert") if name == varies else P() for name in each)
    run = jax.shard_map(local, mesh=expert_mesh(2), in_specs=specs, out_specs=P("expert"))
    # On the host first: to take a device's part eagerly is a program of both devices each time, and
    # several of these in flight can wait for each other where there are few cores.
    found = jax.tree.map(np.asarray, jax.jit(run)(*arrays.values()))
    for device in range(2):
        own = arrays | {varies: arrays[varies][device]}
        for got, expected in zip(found, by_numpy(*own.values(), 2), strict=True):
            np.testing.assert_array_equal(got[device], expected)


def test_no_tokens_choose_nothing():
    found = top_k_sort(jnp.zeros((0, 4)), jnp.zeros(0, bool), 2)
    assert (found.experts.shape, found.choice.shape) == ((0, 2), (0,))
    assert found.expert_tokens.tolist() == [0] * 4


@pytest.mark.slow
# JAX 0.12 says that it will drop this backend one day; until then it is what lowers these kernels.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "launches"), [((32, 128, 8), 1), ((512, 256, 8), 2), ((300, 512, 16), 2)]
)
def test_few_tokens_are_one_launch_on_a_gpu_and_many_are_two(shape, launches):
    scores, mask, rank = drawn(shape, 2, 0.0)
    run = jax.jit(functools.partial(top_k_sort_by_kernels, experts_per_token=shape[2]))
    text = lowered_for_gpu(run, scores, mask, rank)
    assert text.count("xla.gpu.triton") == launches
