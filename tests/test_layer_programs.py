"""What a step's program contains, and how much memory it takes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_eplb import MoE, MoEConfig, expert_mesh
from tests.light_compile import light_compile

RANKS, EXPERTS, EMBED, HIDDEN, TOKENS = 8, 32, 64, 32, 1024


@functools.cache
def compiled(exchange="waves", cap=None):
    """The compiled layer, and what it gives: output, tokens of each rank.

    Every token chooses experts 0 to 3, whose only slots are on rank 0.
    """
    config = MoEConfig(
        embed_dim=EMBED,
        hidden_dim=HIDDEN,
        num_experts=EXPERTS,
        experts_per_token=4,
        num_slots=EXPERTS,
        num_ranks=RANKS,
        exchange=exchange,
        moe_max_num_tokens=cap,
    )
    with light_compile():  # of the weights
        layer = MoE(config, mesh=expert_mesh(RANKS), rngs=nnx.Rngs(0))
    router = np.zeros((EMBED, EXPERTS), np.float32)
    router[:, :4] = [[4.0, 3.0, 2.0, 1.0]]
    layer.router[...] = jax.device_put(router, layer.router[...].sharding)
    tokens = np.abs(np.random.default_rng(0).normal(size=(TOKENS, EMBED))).astype(np.float32)
    graph, state = nnx.split(layer)

    def run(state, tokens):
        copy = nnx.merge(graph, state, copy=True)
        return copy(tokens), copy.rank_tokens[...]

    program = jax.jit(run).lower(state, tokens).compile()
    return program, *program(state, jnp.asarray(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["waves", "all_gather"])
def test_no_expert_weights_are_gathered(exchange):
    text = compiled(exchange)[0].as_text()
    gathered = re.findall(r"(\w+)\[([\d,]*)\][^\n]*? all-gather(?:-start)?\(", text)
    sizes = [math.prod(map(int, dims.split(","))) for _, dims in gathered if dims]
    one_expert = HIDDEN * EMBED  # the smaller matrix
    # What may be gathered: counts, and the tokens of `all_gather`.
    allowed = TOKENS * EMBED if exchange == "all_gather" else one_expert - 1
    assert all(size <= allowed for size in sizes), gathered
    assert len(sizes) > 0 or exchange == "waves"
    # No array of the whole bank exists on a device in any form.
    for whole_bank in ("[32,64,2,32]", "[32,64,64]", "[32,32,64]"):
        assert whole_bank not in text


@pytest.mark.slow
def test_a_cap_bounds_the_memory_when_all_tokens_go_to_one_rank_and_drops_none():
    (whole, expected, _), (capped, out, _) = compiled(), compiled(cap=64)
    np.testing.assert_array_equal(out, expected)
    for _, _, rank_tokens in (compiled(), compiled(cap=64)):
        assert rank_tokens.tolist() == [TOKENS * 4, 0, 0, 0, 0, 0, 0, 0]
    one_row = EMBED * 4  # bytes
    own_results = TOKENS // RANKS * 4 * one_row  # a rank's own choices, which wait for the sum
    # All devices are simulated in one process, yet XLA tells the memory of one of them.
    bytes_of_whole, bytes_of_capped = (
        program.memory_analysis().temp_size_in_bytes for program in (whole, capped)
    )
    assert bytes_of_whole > TOKENS * 4 * one_row
    assert bytes_of_capped < 2 * own_results + 10 * 64 * one_row
