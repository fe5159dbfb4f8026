"""What `plan` refuses, each with the value and the remedy; nothing here compiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.placement import Placement
from jax_eplb.planner import frontier, plan


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.ones(4), r"shape \(4,\); expected \[layers, experts\]"),
        (np.ones((0, 4)), r"shape \(0, 4\)"),
        (np.array([["a", "b"]]), "load is <U1; expected counts"),
        (np.array([[1j, 2, 3, 4]]), "load is complex128; expected counts"),
        (np.array([[1, 2, 3, np.nan]]), "layer 7, expert 3: load nan"),
        (np.array([[1, -2, 3, 4]]), r"layer 7, expert 1: load -2\.0; expected a count"),
        (np.array([[[1, 2, 3, 4]], [[1, 2, np.inf, 4]]]), "window 1, layer 7, expert 2: load inf"),
        (jnp.array([[1.0, 2, -3, 4]]), "layer 7, expert 2"),
        (jnp.array([[1.0, 2, -3, 4]], jnp.bfloat16), "layer 7, expert 2"),
        ([[1, 2, 3, -4]], "layer 7, expert 3"),
    ],
)
def test_a_damaged_load_is_refused_by_name(load, message):
    with pytest.raises(ValueError, match=message):
        plan(load, num_slots=4, num_ranks=2, layer_ids=[7])


@pytest.mark.parametrize(
    ("num_slots", "num_ranks", "message"),
    [
        (6, 4, "6 slots cannot be divided among 4 ranks; use a multiple of 4, such as 8"),
        (2, 2, "2 slots cannot hold 4 experts; use at least 4"),
        (4, 0, "number of ranks is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(num_slots, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        plan(np.ones((1, 4)), num_slots=num_slots, num_ranks=num_ranks)


def test_layer_ids_must_fit_the_load():
    with pytest.raises(ValueError, match="3 layer ids were given for 2 layers"):
        plan(np.ones((2, 4)), num_slots=4, num_ranks=2, layer_ids=[1, 2, 3])


SIZES = {"num_slots": 16, "num_ranks": 4}
LOAD = np.ones((2, 8))
FORCE = Placement.default(num_experts=8, num_slots=16, num_ranks=4, num_layers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "odd"}, "split 'odd' must be 'even' or 'balanced'"),
        ({"method": "luck"}, "method 'luck' must be 'search' or 'deepseek'"),
        ({"effort": "much"}, "effort 'much' must be one of"),
        ({"num_nodes": 3}, "4 ranks cannot be divided among 3 nodes"),
        ({"num_groups": 3}, "8 experts cannot be divided into 3 groups"),
        ({"num_groups": 4, "num_nodes": 0}, "the number of nodes is 0"),
        ({"spread_replicas": True}, "spread_replicas needs two nodes or more"),
        (
            {"spread_replicas": True, "num_nodes": 2, "num_groups": 4},
            "num_groups keeps them on one: give cross_node_weight, or leave one out",
        ),
        ({"cross_node_weight": 0.1, "num_groups": 4}, "give num_nodes and num_groups"),
        (
            {"cross_node_weight": -1.0, "num_nodes": 2, "num_groups": 4},
            r"cross_node_weight is -1\.0; expected 0 or more",
        ),
        (
            {"cross_node_weight": np.nan, "num_nodes": 2, "num_groups": 4},
            "cross_node_weight is nan",
        ),
        ({"method": "deepseek", "capacity": [1, 1, 1, 2]}, "'deepseek' knows no capacity"),
        ({"method": "deepseek", "previous": FORCE, "max_moves": 3}, "knows no max_moves"),
        ({"method": "deepseek", "spread_replicas": True}, "knows no spread_replicas"),
        ({"max_moves": 3}, "max_moves needs the placement in force: give previous"),
        ({"previous": FORCE, "max_moves": -1}, "max_moves is -1; expected 0 or more"),
        ({"previous": FORCE, "max_moves": 2.5}, r"max_moves is 2\.5; expected a whole number"),
        ({"previous": FORCE, "max_moves": [1, 2, 3]}, "or one for each of the 2 layers"),
    ],
)
def test_options_that_exclude_each_other_or_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(LOAD, **SIZES, **options)


@pytest.mark.parametrize(
    ("capacity", "options", "message"),
    [
        ([1, 1], {}, r"capacity has shape \(2,\); expected \(4,\), a rank each"),
        ([1, 1, -1, 1], {}, r"capacity of rank 2 is -1\.0; expected 0 or more"),
        ([1, np.inf, 1, 1], {}, "capacity of rank 1 is inf"),
        ([1, 0, 0, 0], {}, "ranks of a capacity above 0 have 4 slots for 8 experts; use more"),
        (
            [1, 1, 0, 0],
            {"num_nodes": 2, "num_groups": 4},
            "node 1: its ranks of a capacity above 0 have 0 slots for the 4 experts of its groups; "
            "use more slots, or place the experts freely, without num_groups",
        ),
    ],
)
def test_too_little_capacity_is_refused(capacity, options, message):
    with pytest.raises(ValueError, match=message):
        plan(LOAD, **SIZES, capacity=capacity, **options)


def test_each_node_needs_slots_for_the_experts_of_its_groups():
    # 12 of 16 slots are left for 10 experts, but 2 on node 1 for 5.
    options = {"num_nodes": 2, "num_groups": 2, "capacity": [1, 1, 1, 1, 1, 0, 0, 0]}
    with pytest.raises(ValueError, match=r"node 1: .* have 2 slots for the 5 experts"):
        plan(np.ones((1, 10)), num_slots=16, num_ranks=8, **options)


@pytest.mark.parametrize(
    ("previous", "message"),
    [
        (np.zeros((2, 12), int), r"previous has shape \(2, 12\); expected \(2, 16\)"),
        (np.full((2, 16), 9), "previous, layer 0, slot 0: expert 9; expected 0 to 7, or 8 in a"),
        (np.full((2, 16), -1), "previous, layer 0, slot 0: expert -1"),
        (
            Placement.default(num_experts=6, num_slots=16, num_ranks=4, num_layers=2),
            "previous is of experts 6, the plan of experts 8",
        ),
        (
            Placement.default(num_experts=8, num_slots=16, num_ranks=8, num_layers=2),
            "previous is of ranks 8, the plan of ranks 4",
        ),
    ],
)
def test_a_placement_in_force_of_something_else_is_refused(previous, message):
    with pytest.raises(ValueError, match=message):
        plan(LOAD, **SIZES, previous=previous)


def test_layers_of_the_placement_in_force_must_be_those_of_the_plan():
    with pytest.raises(ValueError, match=r"previous is of layers \(0, 1\), the plan of layers"):
        plan(LOAD, **SIZES, previous=FORCE, layer_ids=[3, 4])


def test_a_frontier_refuses_what_a_plan_does():
    with pytest.raises(ValueError, match="max_moves is -2; expected 0 or more"):
        next(frontier(LOAD, FORCE, [-2]))
