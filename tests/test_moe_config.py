import re

import pytest

from jax_eplb import MoEConfig
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


def test_without_a_cap_one_wave_takes_all_that_one_rank_could_get():
    # 12 slots on 4 ranks: both choices of every token can go to one rank.
    assert config().exchange_sizes(32) == ("waves", (64,), False)
    # Twice the even share is tried first where that is less, and enough less to be worth asking.
    assert config(embed_dim=2048).exchange_sizes(1024).capacities == (2 * 1024 * 2 // 4, 1024 * 2)
    assert config(embed_dim=512).exchange_sizes(1024).capacities == (1024 * 2,)
    large = config().exchange_sizes(4096)  # 2048 rows for each pair of ranks
    assert large == ("waves", (2176, 2304, 2560, 3072, 4096, 8192), False)
    assert config(exchange="ragged").exchange_sizes(4096) == ("ragged", (4096 * 2,), False)
    assert config(exchange="all_gather").exchange_sizes(4096) == ("all_gather", (4096,), False)


def test_a_token_goes_to_no_more_slots_than_a_rank_has():
    one_slot = config(num_slots=8, num_ranks=8, experts_per_token=8)
    assert one_slot.exchange_sizes(32).capacities == (32,)


def test_the_cap_is_divided_among_the_senders():
    assert config(moe_max_num_tokens=30).exchange_sizes(4096) == ("waves", (7,), True)
    assert config(moe_max_num_tokens=4).exchange_sizes(4096) == ("waves", (1,), True)
    # A cap that all fits into is none.
    assert config(moe_max_num_tokens=4096).exchange_sizes(4) == ("waves", (8,), False)
    gathered = config(exchange="all_gather", moe_max_num_tokens=30)
    assert gathered.exchange_sizes(4096) == ("all_gather", (3,), True)  # 4 ranks · 3 tokens · 2
    assert gathered.exchange_sizes(2) == ("all_gather", (2,), False)


@pytest.mark.parametrize("exchange", ["waves", "ragged", "all_gather"])
@pytest.mark.parametrize("cap", [None, 8])
def test_an_empty_batch_has_a_wave_to_be_compiled(exchange, cap):
    sizes = config(exchange=exchange, moe_max_num_tokens=cap).exchange_sizes(0)
    assert sizes.capacities == (1,)


def test_a_gated_activation_takes_twice_the_columns():
    assert config().gate_up_dim == 12
    assert config(activation="gelu").gate_up_dim == 6
