import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from jax_eplb import Placement
from tests.light_compile import light_compile
from tests.placement_cases import random_table, seeds
from tests.small_decoder import SMALL, Runner, default_placement, drawn_on_host

SLOTS, T = 16, 7


@functools.cache
def runner(ranks):
    return Runner(default_placement(SMALL, SLOTS, ranks))


def text(sequences, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, (sequences, length))


def by_numpy(tokens, config=SMALL):
    """float64 logits [T, V] of one sequence, token by token, without ranks, slots or cache."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), drawn_on_host(config))
    x = params.embed[tokens]

    def normed(x, scale):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.norm_epsilon) * scale

    def gated(x, gate_up, down):
        gate, up = np.split(x @ gate_up, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    def rotated(x):  # [T, H, head]
        half = config.head_dim // 2
        frequency = config.rope_base ** (-np.arange(half) / half)
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(x, layer, i):
        qkv = normed(x, layer.norm[i]) @ layer.query_key_value[i]
        shape = (len(x), 3, config.num_heads, config.head_dim)
        query, key, value = qkv.reshape(shape).transpose(1, 0, 2, 3)
        scores = np.einsum("thd,shd->hts", rotated(query), rotated(key)) / config.head_dim**0.5
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
        likely /= likely.sum(axis=-1, keepdims=True)
        return np.einsum("hts,shd->thd", likely, value).reshape(len(x), -1) @ layer.out[i]

    for i in range(config.num_dense_layers):
        x = x + attention(x, params.dense.attention, i)
        weights = params.dense.feed_forward
        x = x + gated(normed(x, params.dense.norm[i]), weights.gate_up[i], weights.down[i])
    for i in range(config.num_moe_layers):
        x = x + attention(x, params.sparse.attention, i)
        rows, moe, out = normed(x, params.sparse.norm[i]), params.sparse.moe, []
        for row in rows:
            logits = row @ moe.router[i]
            chosen = np.argsort(-logits)[: config.experts_per_token]
            weights = np.exp(logits[chosen] - logits.max())
            each = [gated(row, moe.experts.gate_up[i, e], moe.experts.down[i, e]) for e in chosen]
            out.append(weights / weights.sum() @ each)
        x = x + np.array(out)
        if moe.shared is not None:
            x = x + gated(rows, moe.shared.gate_up[i], moe.shared.down[i])
    return normed(x, params.norm) @ params.unembed


def test_the_logits_are_numpys():
    tokens = text(8)
    logits = runner(4)(tokens)[0]
    for sequence, found in zip(tokens, logits, strict=True):
        np.testing.assert_allclose(found, by_numpy(sequence), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_without_dense_layers_and_without_a_shared_expert_they_are_numpys_too():
    config = dataclasses.replace(SMALL, num_layers=1, num_dense_layers=0, shared_hidden_dim=0)
    tokens = text(2)
    with light_compile():  # values are compared, and no other test takes this program
        logits = Runner(default_placement(config, 8, 2), config)(tokens)[0]
    for sequence, found in zip(tokens, logits, strict=True):
        np.testing.assert_allclose(found, by_numpy(sequence, config), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_prefill_and_decoding_with_the_cache_give_the_uncached_logits():
    run, tokens = runner(4), text(8)
    whole = run(tokens)[0]
    first_four = np.tile(np.arange(T) < 4, (8, 1))
    logits, cache, *_ = run(tokens, valid=first_four, cache=run.empty_cache(8))
    np.testing.assert_allclose(logits[:, :4], whole[:, :4], rtol=1e-4, atol=1e-5)
    for t in range(4, T):
        logits, cache, *_ = run(tokens[:, t : t + 1], start=np.full(8, t), cache=cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


def generated(run, tokens, lengths):
    """Prefill prompts of these lengths, then four greedy steps: logits [B, 5, V] and tokens."""
    size, rows = len(tokens), np.arange(len(tokens))
    valid = np.arange(T) < lengths[:, None]
    logits, cache, *_ = run(tokens, valid=valid, cache=run.empty_cache(size))
    seen = [np.asarray(logits)[rows, np.maximum(lengths, 1) - 1]]
    for step in range(4):
        following = seen[-1].argmax(axis=1)[:, None]
        logits, cache, *_ = run(
            following, start=lengths + step, valid=lengths[:, None] > 0, cache=cache
        )
        seen.append(np.asarray(logits)[:, 0])
    return np.stack(seen, axis=1)


@pytest.mark.slow
def test_a_sequence_among_others_gives_the_bits_it_gives_alone():
    tokens, lengths = text(8), np.array([7, 2, 5, 1, 6, 3, 4, 7])
    together = generated(runner(4), tokens, lengths)
    for i in range(8):
        alone = np.where(np.arange(8) == i, lengths, 0)
        found = generated(runner(4), tokens, alone)[i]
        np.testing.assert_array_equal(found, together[i])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_number_of_ranks_changes_no_bit(ranks):
    tokens, lengths = text(8), np.array([7, 2, 5, 1, 6, 3, 4, 7])
    few, four = generated(runner(ranks), tokens, lengths), generated(runner(4), tokens, lengths)
    np.testing.assert_array_equal(few, four)


@given(seeds)
@settings(max_examples=8)
def test_a_placement_changes_no_bit_and_compiles_nothing(seed):
    run, tokens = runner(4), text(8)
    default = default_placement(SMALL, SLOTS, 4)
    run.use(default)
    expected = np.asarray(run(tokens)[0])
    compiled = run.run._cache_size()
    table = random_table(np.random.default_rng(seed), 2, SMALL.num_experts, SLOTS, 4)
    run.use(
        Placement.from_slots(
            table, num_experts=SMALL.num_experts, num_ranks=4, layer_ids=SMALL.moe_layer_ids
        )
    )
    np.testing.assert_array_equal(run(tokens)[0], expected)
    assert run.run._cache_size() == compiled
    run.use(default)


@pytest.mark.slow
def test_seats_say_where_a_sequence_is_kept():
    run, tokens = runner(4), text(8)
    swapped = np.array([1, 0] * 4)
    cache = run.empty_cache(8)
    logits, plain, *_ = run(tokens, cache=cache)
    other, turned, *_ = run(tokens, cache=cache, seats=swapped)
    np.testing.assert_array_equal(logits, other)
    order = np.arange(8).reshape(4, 2)[:, ::-1].ravel()
    np.testing.assert_array_equal(plain.keys, np.asarray(turned.keys)[:, order])


@pytest.mark.slow
def test_padding_is_not_counted_nor_written_to_the_cache():
    run, tokens = runner(4), text(8)
    lengths = np.array([7, 1, 0, 0, 3, 0, 0, 0])  # ranks 1 and 3 have no tokens
    valid = np.arange(T) < lengths[:, None]
    _, cache, expert_tokens, rank_tokens = run(tokens, valid=valid, cache=run.empty_cache(8))
    choices = SMALL.experts_per_token
    np.testing.assert_array_equal(expert_tokens.sum(axis=2), np.tile([[16], [0], [6], [0]], 2))
    np.testing.assert_array_equal(rank_tokens.sum(axis=0), [lengths.sum() * choices] * 2)
    written = np.asarray(cache.keys).any(axis=(0, 3, 4))  # [B, C]
    np.testing.assert_array_equal(written, np.arange(12) < lengths[:, None])
    assert not np.isnan(np.asarray(cache.values)).any()
