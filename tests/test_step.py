"""One step of serving: what it samples, and what it writes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb import expert_mesh
from jax_eplb.models import Cache, parameters
from jax_eplb.serving.step import AXIS, State, Statics, run_step
from tests.small_decoder import Runner, default_placement
from tests.tiny_model import CONFIG, tiny_decoder

# The quick tests of `test_engine` take such steps, too.
pytestmark = [pytest.mark.light_compile, pytest.mark.slow]

RANKS, SEATS, WIDTH, CAPACITY = 2, 4, 4, 8  # two seats and two rows a rank
PLACEMENT = default_placement(CONFIG, CONFIG.num_experts, RANKS)
# Above any difference of logits: what is sampled is then the noise's maximum.
HOT = 1e6


@functools.cache
def model():
    mesh = expert_mesh(RANKS)
    slots = np.asarray(PLACEMENT.slot_to_expert)
    params = parameters.on_mesh(tiny_decoder().params, slots, CONFIG, mesh, AXIS, jnp.float32)
    moe = CONFIG.moe(num_slots=PLACEMENT.num_slots, num_ranks=RANKS)
    return Statics(CONFIG, moe, mesh), params, PLACEMENT.tables()


def old_state() -> State:
    """As after other sequences: no zeros anywhere."""
    generator = np.random.default_rng(1)
    shape = (CONFIG.num_layers, SEATS, CAPACITY, CONFIG.num_heads, CONFIG.head_dim)
    keys, values = generator.normal(size=(2, *shape)).astype(np.float32)
    last_tokens: Any = np.array([201, 202, 203, 204], np.int32)
    return State(Cache(keys, values), last_tokens)


def step(
    prompts, lengths, *, positions=(0,) * 4, seats=(0, 1) * 2, seeds=(0,) * 4, temperature=0.0
):
    """(state, next tokens [P·B], counts by expert [1, L, E]) as numpy."""
    rows = np.array([positions, lengths, seats, seeds], np.int32)
    out = run_step(*model(), old_state(), prompts, rows, np.float32(temperature))
    return jax.tree.map(np.asarray, out[:3])


def prompts_of(seed=0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, CONFIG.vocab_size, (SEATS, WIDTH)).astype(np.int32)


def noise(seed, position) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return np.asarray(jax.random.gumbel(key, (CONFIG.vocab_size,), jnp.float32))


@functools.cache
def logits() -> np.ndarray:
    """[P·B, T, V] of `prompts_of()`, without cache or padding."""
    return np.asarray(Runner(PLACEMENT, CONFIG)(prompts_of())[0])


@pytest.mark.parametrize("temperature", [0, 0.5, 2])
def test_the_token_has_the_largest_logit_plus_temperature_times_noise(temperature):
    lengths, seeds = np.array([4, 1, 2, 3]), [5, 6, 7, 8]
    _, tokens, _ = step(prompts_of(), lengths, seeds=seeds, temperature=temperature)
    last = logits()[np.arange(4), lengths - 1]
    drawn = np.stack([noise(*row) for row in zip(seeds, lengths, strict=True)])
    assert tokens.tolist() == (last + temperature * drawn).argmax(axis=1).tolist()


def test_at_temperature_zero_the_seed_does_not_matter():
    one = step(prompts_of(), [4, 1, 2, 3], seeds=[1, 2, 3, 4])[1]
    other = step(prompts_of(), [4, 1, 2, 3], seeds=[9, 9, 0, 7])[1]
    assert one.tolist() == other.tolist()


def test_the_noise_depends_on_seed_and_position_alone():
    # Four prompts of different lengths that all end before position 4.
    rows = {"lengths": [4, 3, 1, 2], "positions": [0, 1, 3, 2]}
    _, same, _ = step(prompts_of(), **rows, seeds=[5] * 4, temperature=HOT)
    assert same.tolist() == [noise(5, 4).argmax()] * 4
    _, by_seed, _ = step(prompts_of(), **rows, seeds=[5, 6, 7, 8], temperature=HOT)
    assert by_seed.tolist() == [noise(seed, 4).argmax() for seed in (5, 6, 7, 8)]
    _, by_position, _ = step(prompts_of(), [1, 2, 3, 4], seeds=[5] * 4, temperature=HOT)
    assert by_position.tolist() == [noise(5, end).argmax() for end in (1, 2, 3, 4)]
    assert len({*by_seed.tolist()}) == len({*by_position.tolist()}) == 4


@pytest.mark.parametrize("row", range(4))
def test_a_request_gets_the_same_token_in_any_row_and_company(row):
    lengths, seeds = np.array([4, 1, 2, 3]), np.array([5, 6, 7, 8])
    _, tokens, _ = step(prompts_of(), lengths, seeds=seeds, temperature=1)
    # Request 0 in another row among other requests.
    prompts, lengths, seeds = prompts_of(seed=2), [2, 3, 4, 1], [11, 12, 13, 14]
    prompts[row], lengths[row], seeds[row] = prompts_of()[0], 4, 5
    _, moved, _ = step(prompts, lengths, seeds=seeds, seats=(1, 0) * 2, temperature=1)
    assert moved[row] == tokens[0]


def test_a_row_of_length_zero_writes_and_counts_nothing():
    old = old_state()
    # Rank 0 serves its seat 1, rank 1 its seat 0; the rows of the other seats are empty.
    state, tokens, counts = step(prompts_of(), [3, 0, 0, 2], seats=[1, 0, 1, 0], temperature=1)
    assert state.last_tokens.tolist() == [201, tokens[0], tokens[3], 204]
    for new, before in zip(state.cache, old.cache, strict=True):
        for seat, written in enumerate([0, 3, 2, 0]):
            np.testing.assert_array_equal(new[:, seat, written:], before[:, seat, written:])
            assert (new[:, seat, :written] != before[:, seat, :written]).any(axis=(2, 3)).all()
    np.testing.assert_array_equal(counts.sum(axis=2), [[CONFIG.experts_per_token * (3 + 2)] * 2])


def test_an_empty_row_leaves_a_seat_to_the_row_that_has_it():
    state, tokens, _ = step(prompts_of(), [3, 0, 0, 2], seats=[0] * 4, temperature=1)
    assert state.last_tokens.tolist() == [tokens[0], 202, tokens[3], 204]
    alone, _, _ = step(prompts_of(), [3, 0, 0, 2], seats=[0, 1, 1, 0], temperature=1)
    for one, other in zip(state.cache, alone.cache, strict=True):
        np.testing.assert_array_equal(one, other)
