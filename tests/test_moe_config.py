import re

import pytest

from jax_eplb import MoEConfig


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
        ({"max_tokens_per_wave": 3}, "max_tokens_per_wave is 3; a wave carries at least one token"),
        ({"kernel": "fast"}, "unknown grouped_matmul implementation 'fast'"),
    ],
)  # fmt: skip
def test_a_faulty_size_is_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changed)


def test_equal_configs_are_one_key():
    assert {config(): 1}[config()] == 1
    assert config().slots_per_rank == 3


def test_a_small_batch_never_needs_a_second_wave():
    # All 64 choices of 32 tokens fit, even where they go to one rank.
    assert config().wave_capacity(32) == 64


def test_a_large_batch_has_room_for_twice_the_even_share():
    assert config().wave_capacity(4096) == 2 * 4096 * 2 // 4


def test_the_bound_on_a_wave_is_divided_among_the_senders():
    assert config(max_tokens_per_wave=30).wave_capacity(4096) == 7
    assert config(max_tokens_per_wave=4).wave_capacity(4096) == 1
    assert config(max_tokens_per_wave=4096).wave_capacity(4) == 8


def test_an_empty_batch_has_a_wave_to_be_compiled():
    assert config().wave_capacity(0) == 1
