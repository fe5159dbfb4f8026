"""Tables of slots: whose layers the rows are, and what must agree."""

import pytest

from jax_eplb.formats.slot_tables import (
    SlotTable,
    check_count,
    check_row,
    layer_count,
    rows_of_all_layers,
    table_of_rows,
)
from jax_eplb.placement import Placement

ROWS = {0: [0, 1, 0], 1: [1, 0, 1], 4: [0, 0, 1]}


def table(numbering, **known) -> SlotTable:
    return SlotTable(ROWS, 3, numbering, "rows", **known)


@pytest.mark.parametrize(
    ("numbering", "layer_ids", "kept"),
    [
        ("names", None, {0: 0, 1: 1, 4: 4}),
        ("names", (4, 0, 1), {4: 4, 0: 0, 1: 1}),
        ("all", (4, 1), {4: 4, 1: 1}),
        ("moe", (7, 8, 9), {7: 0, 8: 1, 9: 4}),
    ],
)
def test_layer_ids_choose_or_name_the_rows(numbering, layer_ids, kept):
    placement = table(numbering).placement(num_ranks=3, layer_ids=layer_ids)
    assert placement.layer_ids == tuple(kept)
    assert placement.slot_to_expert.tolist() == [ROWS[row] for row in kept.values()]


@pytest.mark.parametrize(
    ("numbering", "layer_ids", "message"),
    [
        ("names", (0, 1), "layer 4 in rows, but the MoE layers are 0, 1"),
        ("names", (0, 1, 4, 5), "layer 5 missing from rows, which has layer 0, 1, 4"),
        ("all", (2,), "layer 2 missing from rows"),
        ("moe", (0, 1), "rows has 3 MoE layers, but there are 2: 0, 1"),
    ],
)
def test_layers_that_do_not_fit_are_named(numbering, layer_ids, message):
    with pytest.raises(ValueError, match=message):
        table(numbering).placement(num_ranks=3, layer_ids=layer_ids)


def test_what_the_file_says_must_be_what_was_asked_for():
    known = table("all", num_experts=2, num_ranks=3)
    assert known.placement(num_ranks=None).num_ranks == 3
    with pytest.raises(ValueError, match="for 3 ranks, but 1 were asked for"):
        known.placement(num_ranks=1)
    with pytest.raises(ValueError, match="for 2 experts, but 3 were asked for"):
        known.placement(num_ranks=3, num_experts=3)
    with pytest.raises(ValueError, match="does not say for how many ranks"):
        table("all").placement(num_ranks=None)
    with pytest.raises(ValueError, match="layer 0: expert 2 has no slot"):
        table("all").placement(num_ranks=3, num_experts=3)


def test_ids_beyond_any_table_are_refused_before_anything_is_counted():
    huge = table_of_rows([[0, 10**30]], field="rows", numbering="all")
    with pytest.raises(ValueError, match=r"2 slots cannot hold 10{29}1 experts"):
        huge.placement(num_ranks=1)
    with pytest.raises(ValueError, match="expert ids must be integers, not object"):
        huge.placement(num_ranks=1, num_experts=2)


def test_dense_layers_are_filled_up_to_the_models_last():
    placement = Placement.from_slots([[1, 0, 1]], num_experts=2, num_ranks=3, layer_ids=[1])
    assert rows_of_all_layers(placement, None) == [[0, 1, 0], [1, 0, 1]]
    assert rows_of_all_layers(placement, 4)[2:] == [[0, 1, 0]] * 2
    with pytest.raises(ValueError, match="said to have 1 layers, but the plan has layer 1; give 2"):
        layer_count([1], 1)
    with pytest.raises(ValueError, match="layer -1: layers are numbered from 0"):
        layer_count([-1, 3], None)


def test_messages_do_not_grow_with_what_is_wrong():
    nested: list = [0]
    for _ in range(40):
        nested = [nested, nested]  # 2**40 numbers, were it written out
    for check in (
        lambda: check_row(0, [nested]),
        lambda: check_count(nested, "moe_layer_count"),
        lambda: table_of_rows({1: nested}, field="rows", numbering="all"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            check()
        assert len(str(caught.value)) < 500
