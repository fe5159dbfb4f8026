import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb import MoEConfig
from jax_eplb.moe.exchange import IMPLEMENTATIONS
from jax_eplb.routing import POLICIES, RouterConfig


def config(**changed):
    sizes = {"embed_dim": 4, "hidden_dim": 6, "num_experts": 8, "experts_per_token": 2}
    return MoEConfig(**sizes | {"num_slots": 12, "num_ranks": 4} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_slots": 10}, "10 slots cannot be divided among 4 ranks"),
        ({"num_slots": 4}, "4 slots cannot hold 8 experts"),
        ({"num_ranks": 0}, "the number of ranks is 0"),
        ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
        ({"hidden_dim": -2}, "hidden_dim is -2; it must be at least 1"),
        ({"shared_hidden_dim": -1}, "shared_hidden_dim is -1; it must be at least 0"),
        ({"experts_per_token": 0}, "experts_per_token is 0; it must lie between 1 and"),
        ({"experts_per_token": 9}, "experts_per_token is 9; it must lie between 1 and the number "
         "of experts, 8"),
        ({"moe_max_num_tokens": 3}, "moe_max_num_tokens is 3; the least that a rank takes in a "
         "round, with exchange 'waves', is 4 rows"),
        ({"moe_max_num_tokens": 7, "exchange": "all_gather"}, "with exchange 'all_gather', is 8"),
        ({"exchange": "broadcast"}, "unknown exchange 'broadcast'; use one of waves, all_gather"),
        ({"replica_choice": "odd"}, "unknown replica_choice 'odd'; use one of even, local"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"shared_gate": True}, "shared_gate needs a shared expert; set shared_hidden_dim"),
        ({"ranks_per_node": 3}, "ranks_per_node is 3; it must divide the number of ranks, 4"),
        ({"router": RouterConfig(num_groups=3)}, "8 experts do not divide into num_groups=3"),
        ({"kernel": "fast"}, "unknown grouped_matmul implementation 'fast'"),
    ],
)  # fmt: skip
def test_a_faulty_size_is_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changed)


def test_small_batches_read_few_replicas_and_large_ones_are_balanced():
    auto = config(replica_choice="auto")
    assert auto.needs_leveling
    # 4 ranks of T tokens, two of 8 experts each: T choices of the mean expert.
    assert auto.policy(128) is POLICIES["fewest"]
    assert auto.policy(129) is POLICIES["balanced"]
    assert config(replica_choice="local").policy(1) is POLICIES["local"]


def test_equal_configs_are_one_key():
    assert {config(): 1}[config()] == 1
    assert config().slots_per_rank == 3


def test_without_a_cap_a_small_batch_goes_in_one_wave_whatever_its_skew():
    # 12 slots on 4 ranks: both choices of every token can go to one rank.
    assert config().exchange_sizes(32) == ("waves", (64,), None)
    assert config(embed_dim=512).exchange_sizes(1024) == ("waves", (1024 * 2,), None)
    # Twice the even share is tried first where that is less, and enough less to be worth asking.
    wide = config(embed_dim=2048).exchange_sizes(1024)
    assert wide == ("waves", (2 * 1024 * 2 // 4, 1024 * 2), None)
    assert config(exchange="ragged").exchange_sizes(4096) == ("ragged", (4096 * 2,), None)
    assert config(exchange="all_gather").exchange_sizes(4096) == ("all_gather", (4096,), None)


def test_without_a_cap_a_large_batch_that_is_skewed_goes_in_several_waves():
    large = config().exchange_sizes(4096)  # 2048 rows for each pair of ranks
    assert large == ("waves", (2176, 2304, 2560, 3072), 3072 // 2)
    # Between two ranks the worst case is twice the even share, which is no more than it is worth.
    assert config(num_ranks=2).exchange_sizes(4096).in_several is None


@given(
    num_tokens=st.integers(0, 20000),
    num_ranks=st.sampled_from([1, 2, 4, 8, 32]),
    embed_dim=st.sampled_from([4, 512, 7168]),
    exchange=st.sampled_from(IMPLEMENTATIONS),
    cap=st.one_of(st.none(), st.integers(300, 100_000)),
)
def test_whatever_is_routed_has_a_buffer_within_the_bound(
    num_tokens, num_ranks, embed_dim, exchange, cap
):
    sizes = config(
        num_experts=64,
        num_slots=64,
        experts_per_token=8,
        num_ranks=num_ranks,
        embed_dim=embed_dim,
        exchange=exchange,
        moe_max_num_tokens=cap,
    ).exchange_sizes(num_tokens)
    assert list(sizes.in_one_wave) == sorted(set(sizes.in_one_wave))
    on_one_rank = min(8, 64 // num_ranks)
    everything = num_tokens if exchange == "all_gather" else num_tokens * on_one_rank
    if sizes.in_several is None:
        assert sizes.in_one_wave[-1] >= everything
    received = num_ranks * max(*sizes.in_one_wave, sizes.in_several or 1, 1)
    if exchange == "all_gather":
        received *= on_one_rank
    assert cap is None or received <= cap


OF_R1 = {"embed_dim": 7168, "num_experts": 256, "experts_per_token": 8}


def test_buffers_are_near_the_even_share_on_many_ranks():
    on_36 = config(**OF_R1, num_slots=288, num_ranks=36)
    # The share is 28.4 rows, where all of a rank's 1,024 may be for one other.
    assert on_36.exchange_sizes(128) == ("waves", (57, 114, 228), 228)
    assert on_36.exchange_sizes(8192) == ("waves", (1935, 2048, 2276, 2731), 1366)
    ragged = dataclasses.replace(on_36, exchange="ragged")
    assert ragged.exchange_sizes(8192) == ("ragged", (7282,), 3641)
    # A share of 512 rows is little, but all 65,536 are many. One of 8 is moved far by chance.
    on_128 = config(**OF_R1, num_slots=256, num_ranks=128)
    assert on_128.exchange_sizes(8192) == ("waves", (544, 576, 640, 768), 384)
    assert on_128.exchange_sizes(128) == ("waves", (23, 45, 89), 89)


def test_a_token_goes_to_no_more_slots_than_a_rank_has():
    one_slot = config(num_slots=8, num_ranks=8, experts_per_token=8)
    assert one_slot.exchange_sizes(32).in_one_wave == (32,)


def test_the_cap_is_divided_among_the_senders():
    assert config(moe_max_num_tokens=30).exchange_sizes(4096) == ("waves", (), 7)
    assert config(moe_max_num_tokens=4).exchange_sizes(4096) == ("waves", (), 1)
    # A cap that all fits into is none.
    assert config(moe_max_num_tokens=4096).exchange_sizes(4) == ("waves", (8,), None)
    gathered = config(exchange="all_gather", moe_max_num_tokens=30)
    assert gathered.exchange_sizes(4096) == ("all_gather", (), 3)  # 4 ranks · 3 tokens · 2
    assert gathered.exchange_sizes(2) == ("all_gather", (2,), None)


def test_a_cap_above_the_even_share_leaves_the_buffers_below_it():
    capped = config(moe_max_num_tokens=4 * 2500)
    assert capped.exchange_sizes(4096) == ("waves", (2176, 2304, 2500), 2500)


@pytest.mark.parametrize("exchange", ["waves", "ragged", "all_gather"])
@pytest.mark.parametrize("cap", [None, 8])
def test_an_empty_batch_has_a_wave_to_be_compiled(exchange, cap):
    sizes = config(exchange=exchange, moe_max_num_tokens=cap).exchange_sizes(0)
    assert sizes.in_one_wave == (1,)


def test_a_gated_activation_takes_twice_the_columns():
    assert config().gate_up_dim == 12
    assert config(activation="gelu").gate_up_dim == 6
