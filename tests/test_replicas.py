import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from jax_eplb import Placement
from jax_eplb.routing import even
from tests.placement_cases import random_table, seeds, sizes

jitted = jax.jit(even, static_argnames="num_slots")


def split(experts, mask, placement, rank):
    tables = placement.tables()
    return np.asarray(
        jitted(
            jnp.asarray(experts, jnp.int32),
            jnp.asarray(mask),
            tables.expert_to_slots[0],
            tables.replica_count[0],
            rank=jnp.int32(rank),
            num_slots=placement.num_slots,
        )
    )


TWO_REPLICAS = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)


def test_choices_are_dealt_in_turn_from_a_replica_that_the_rank_sets():
    tokens, mask = [[0, 1], [0, 2], [0, 1]], [True] * 3
    assert split(tokens, mask, TWO_REPLICAS, 0).tolist() == [[0, 1], [3, 2], [0, 1]]
    assert split(tokens, mask, TWO_REPLICAS, 1).tolist() == [[3, 1], [0, 2], [3, 1]]


def test_padding_goes_nowhere_and_takes_no_turn():
    tokens, mask = [[0, 1], [0, 1], [0, 1]], [True, False, True]
    assert split(tokens, mask, TWO_REPLICAS, 0).tolist() == [[0, 1], [4, 4], [3, 1]]


@given(sizes, seeds)
def test_each_expert_is_split_within_one_on_every_rank_and_over_all_ranks(drawn, seed):
    (experts, slots, ranks), tokens = drawn, 24
    generator = np.random.default_rng(seed)
    table = random_table(generator, 1, experts, slots, ranks)
    placement = Placement.from_slots(table, num_experts=experts, num_ranks=ranks)
    choices = min(2, experts)
    for rank in range(ranks):
        chosen = generator.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :choices]
        mask = generator.random(tokens) < 0.7
        slot = split(chosen, mask, placement, rank)
        assert (slot[~mask] == slots).all()
        np.testing.assert_array_equal(table[0][slot[mask]], chosen[mask])
        share = np.bincount(slot[mask].ravel(), minlength=slots)
        for expert in range(experts):
            of_expert = share[table[0] == expert]
            assert of_expert.max() - of_expert.min() <= 1


def test_the_remainders_of_the_ranks_do_not_meet_on_one_replica():
    placement = Placement.from_slots([[0, 1, 0, 1]], num_experts=2, num_ranks=2)
    share = sum(
        np.bincount(split([[0]] * 3, [True] * 3, placement, rank).ravel(), minlength=4)
        for rank in range(2)
    )
    assert share.tolist() == [3, 0, 3, 0]
