import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.moe.exchange_sizes import IMPLEMENTATIONS, exchange_sizes

# 12 slots on 4 ranks: both choices of every token can go to one rank.
SMALL = {"choices_per_token": 2, "num_ranks": 4, "slots_per_rank": 3, "embed_dim": 4}
# DeepSeek-R1
OF_R1 = {"choices_per_token": 8, "num_ranks": 36, "slots_per_rank": 8, "embed_dim": 7168}


def sizes(num_tokens, exchange="waves", most_rows=None, like=SMALL, **changed):
    return exchange_sizes(exchange, num_tokens, **like | changed, most_rows=most_rows)


def test_without_a_bound_a_small_batch_goes_in_one_wave_whatever_its_skew():
    assert sizes(32) == ("waves", (64,), None)
    assert sizes(1024, embed_dim=512) == ("waves", (1024 * 2,), None)
    # Twice the even share is tried first where that is less, and enough less to be worth asking.
    assert sizes(1024, embed_dim=2048) == ("waves", (2 * 1024 * 2 // 4, 1024 * 2), None)
    assert sizes(4096, "ragged") == ("ragged", (4096 * 2,), None)
    assert sizes(4096, "all_gather") == ("all_gather", (4096,), None)


def test_without_a_bound_a_large_batch_that_is_skewed_goes_in_several_waves():
    assert sizes(4096) == ("waves", (2176, 2304, 2560, 3072), 3072 // 2)  # the share is 2,048
    # Between two ranks the worst case is but twice the even share.
    assert sizes(4096, num_ranks=2, slots_per_rank=6).in_several is None


def test_buffers_are_near_the_even_share_on_many_ranks():
    # The share is 28.4 rows, where all of a rank's 1,024 may be for one other.
    assert sizes(128, like=OF_R1) == ("waves", (57, 114, 228), 228)
    assert sizes(8192, like=OF_R1) == ("waves", (1935, 2048, 2276, 2731), 1366)
    assert sizes(8192, "ragged", like=OF_R1) == ("ragged", (7282,), 3641)
    # A share of 512 rows is little, but all 65,536 are many. One of 8 is moved far by chance.
    on_128 = OF_R1 | {"num_ranks": 128, "slots_per_rank": 2}
    assert sizes(8192, like=on_128) == ("waves", (544, 576, 640, 768), 384)
    assert sizes(128, like=on_128) == ("waves", (23, 45, 89), 89)


def test_a_token_goes_to_no_more_slots_than_a_rank_has():
    assert sizes(32, choices_per_token=8, slots_per_rank=1).in_one_wave == (32,)


def test_the_bound_is_divided_among_the_senders():
    assert sizes(4096, most_rows=30) == ("waves", (), 7)
    assert sizes(4096, most_rows=4) == ("waves", (), 1)
    # A bound that all fits into is none.
    assert sizes(4, most_rows=4096) == ("waves", (8,), None)
    gathered = sizes(4096, "all_gather", most_rows=30)
    assert gathered == ("all_gather", (), 3)  # 4 ranks · 3 tokens · 2
    assert sizes(2, "all_gather", most_rows=30) == ("all_gather", (2,), None)


def test_a_bound_above_the_even_share_leaves_the_buffers_below_it():
    assert sizes(4096, most_rows=4 * 2500) == ("waves", (2176, 2304, 2500), 2500)


def test_more_travels_for_a_fuller_pair_where_there_is_a_choice():
    assert sizes(4096).fit_the_fullest_pair
    assert sizes(4096, most_rows=30).fit_the_fullest_pair
    assert not sizes(32).fit_the_fullest_pair
    assert not sizes(8192, "ragged", like=OF_R1).fit_the_fullest_pair
    assert not sizes(4096, "all_gather", most_rows=30).fit_the_fullest_pair


@given(
    num_tokens=st.integers(0, 20000),
    num_ranks=st.sampled_from([1, 2, 4, 8, 32]),
    embed_dim=st.sampled_from([4, 512, 7168]),
    exchange=st.sampled_from(IMPLEMENTATIONS),
    most_rows=st.one_of(st.none(), st.integers(300, 100_000)),
)
def test_whatever_is_routed_has_a_buffer_within_the_bound(
    num_tokens, num_ranks, embed_dim, exchange, most_rows
):
    on_one_rank = min(8, 64 // num_ranks)
    found = sizes(
        num_tokens,
        exchange,
        most_rows,
        choices_per_token=8,
        num_ranks=num_ranks,
        slots_per_rank=64 // num_ranks,
        embed_dim=embed_dim,
    )
    assert list(found.in_one_wave) == sorted(set(found.in_one_wave))
    everything = num_tokens if exchange == "all_gather" else num_tokens * on_one_rank
    if found.in_several is None:
        assert found.in_one_wave[-1] >= everything
    received = num_ranks * max(*found.in_one_wave, found.in_several or 1, 1)
    if exchange == "all_gather":
        received *= on_one_rank
    assert most_rows is None or received <= most_rows


@pytest.mark.parametrize("exchange", IMPLEMENTATIONS)
@pytest.mark.parametrize("most_rows", [None, 8])
def test_an_empty_batch_has_a_wave_to_be_compiled(exchange, most_rows):
    assert sizes(0, exchange, most_rows).in_one_wave == (1,)
