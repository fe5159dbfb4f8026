import re

import jax
import numpy as np
import pytest
from hypothesis import given

from jax_eplb import Placement
from jax_eplb.placement import fewest_slots
from tests.placement_cases import sizes


def test_the_default_layout_without_redundancy_is_the_experts_in_order():
    placement = Placement.default(num_experts=8, num_ranks=4, num_layers=2)
    np.testing.assert_array_equal(placement.slot_to_expert, np.tile(np.arange(8), (2, 1)))
    assert placement.slots_per_rank == 2


def test_sixty_experts_on_eight_ranks_take_sixty_four_slots():
    placement = Placement.default(num_experts=60, num_ranks=8)
    # Rank r begins at 60 r // 8 = 0, 7, 15, 22, 30, 37, 45, 52 and holds eight experts in a row.
    expected = [first + i for first in (0, 7, 15, 22, 30, 37, 45, 52) for i in range(8)]
    assert placement.slot_to_expert.tolist() == [expected]
    assert fewest_slots(60, 8) == placement.num_slots == 64


def test_the_default_layout_wraps_around_with_redundancy():
    placement = Placement.default(num_experts=4, num_slots=12, num_ranks=4)
    assert placement.slot_to_expert.tolist() == [[0, 1, 2, 1, 2, 3, 2, 3, 0, 3, 0, 1]]


@given(sizes)
def test_the_default_layout_is_valid_for_any_sizes(drawn):
    experts, slots, ranks = drawn
    default = Placement.default(num_experts=experts, num_slots=slots, num_ranks=ranks)
    checked = Placement.from_slots(default.slot_to_expert, num_experts=experts, num_ranks=ranks)
    np.testing.assert_array_equal(checked.slot_to_expert, default.slot_to_expert)


def test_a_placement_is_a_pytree_of_one_array():
    placement = Placement.default(num_experts=4, num_ranks=2, layer_ids=(3, 4))
    assert [leaf.shape for leaf in jax.tree.leaves(placement)] == [(2, 4)]
    through = jax.jit(lambda p: p)(placement)
    assert (through.num_experts, through.num_ranks, through.layer_ids) == (4, 2, (3, 4))


def placed(table, experts=3, ranks=2, **keywords):
    return Placement.from_slots(table, num_experts=experts, num_ranks=ranks, **keywords)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: placed([[0, 1, 2]]), "3 slots cannot be divided among 2 ranks; use a multiple of "
         "2, such as 4"),
        (lambda: placed([[0, 1]]), "2 slots cannot hold 3 experts; use at least 4 slots"),
        (lambda: placed([[]]), "the number of slots is 0; it must be at least 1"),
        (lambda: placed([[0, 1]], ranks=0), "the number of ranks is 0"),
        (lambda: placed([[0, 1]], experts=0), "the number of experts is 0"),
        (lambda: placed([]), "at least one layer; there is none"),
        (lambda: placed([[0, 1, 2, 0]], layer_ids=(3, 4)), "2 layer ids were given for 1 layers"),
        (lambda: placed([[0, 1, 2, 0]] * 2, layer_ids=(3, 3)), "layer id 3 stands twice"),
        (lambda: placed([[0, 1, 2, 0], [0, 1, 2]], layer_ids=(3, 4)),
         "layer 4: the list of slots has shape (3,), expected (4,)"),
        (lambda: placed([[0, 1, 2, 0.5]]), "layer 0: expert ids must be integers, not float64"),
        (lambda: placed([[0, 1, 2, 3]]), "layer 0, slot 3: unknown expert 3; this model's experts "
         "are 0 to 2"),
        (lambda: placed([[0, -1, 2, 1]]), "layer 0, slot 1: unknown expert -1"),
        (lambda: placed([[0, 1, 2, 0], [0, 1, 1, 0]], layer_ids=(3, 4)),
         "layer 4: expert 2 has no slot (2 of 3 experts are placed)"),
        (lambda: placed([[0, 0, 0, 0, 1, 2]]), "expert 0 has 4 replicas, more than the 2 "),
        (lambda: Placement.default(num_experts=4, num_ranks=2, num_layers=2, layer_ids=(1,)),
         "1 layer ids were given for 2 layers"),
        (lambda: Placement.default(num_experts=60, num_slots=60, num_ranks=8),
         "60 slots cannot be divided among 8 ranks; use a multiple of 8, such as 64"),
    ],
)  # fmt: skip
def test_a_fault_is_refused_with_its_own_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_slots_may_be_empty_where_that_is_meant_and_every_expert_has_one():
    table = [[0, 1, 3, 2, 3, 3]]
    assert placed(table, may_be_empty=True).slot_to_expert.tolist() == table
    for wrong, message in (([[0, 1, 4, 2]], "unknown expert 4"), ([[0, 1, 3, 3]], "2 has no slot")):
        with pytest.raises(ValueError, match=message):
            placed(wrong, may_be_empty=True)


def test_unsigned_ids_are_accepted():
    assert placed(np.array([[0, 1, 2, 0]], np.uint64)).slot_to_expert.tolist() == [[0, 1, 2, 0]]
