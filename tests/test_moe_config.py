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


def test_a_batch_has_the_sizes_of_the_layer():
    assert config(moe_max_num_tokens=30).exchange_sizes(4096) == ("waves", (), 7)
    one_slot = config(num_slots=8, num_ranks=8, experts_per_token=8, exchange="all_gather")
    assert one_slot.exchange_sizes(32) == ("all_gather", (32,), None)


def test_a_gated_activation_takes_twice_the_columns():
    assert config().gate_up_dim == 12
    assert config(activation="gelu").gate_up_dim == 6
