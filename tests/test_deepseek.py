import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.deepseek import deepseek_plan

pytestmark = pytest.mark.light_compile

# (E, S, P, nodes, G)
FLAT = [(6, 8, 4, 1, 1), (7, 21, 3, 1, 1), (5, 12, 12, 1, 1), (64, 72, 9, 1, 1)]
GROUPED = [(12, 16, 8, 2, 4), (12, 20, 4, 1, 4), (20, 24, 4, 4, 4), (64, 80, 8, 2, 8)]
UNEQUAL = [(12, 18, 6, 2, 3)]  # nodes that cannot have equally many groups


def plan_of(load, num_slots, num_ranks, num_nodes=1, num_groups=1):
    """int64[L, S] by `deepseek_plan`."""
    slots = deepseek_plan(
        jnp.asarray(load, jnp.float32),
        num_slots=num_slots,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        num_groups=num_groups,
    )
    return np.asarray(slots, np.int64)


def pack_reference(weights, num_packs):
    """The items of each pack in the order in which they come, for float32[items]."""
    if len(weights) == num_packs:
        return [[item] for item in range(num_packs)]
    packs = [[] for _ in range(num_packs)]
    height = [np.float32(0)] * num_packs
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        free = [p for p in range(num_packs) if len(packs[p]) < len(weights) // num_packs]
        lightest = min(free, key=lambda p: (height[p], p))
        packs[lightest].append(item)
        height[lightest] += weights[item]
    return packs


def plan_reference(load, num_slots, num_ranks, num_nodes=1, num_groups=1):
    """One layer, float32[E], in plain Python: the list of S experts."""
    if num_groups % num_nodes:
        num_nodes = num_groups = 1
    groups = np.arange(len(load)).reshape(num_groups, -1)
    totals = load[groups].sum(axis=1)
    slots = []
    for own_groups in pack_reference(totals, num_nodes):
        experts = groups[own_groups].reshape(-1)
        own_load, count = load[experts], np.ones(len(experts), np.float32)
        replicas = list(range(len(experts)))
        while len(replicas) < num_slots // num_nodes:
            replicas.append(int((own_load / count).argmax()))
            count[replicas[-1]] += 1
        share = (own_load / count)[replicas]
        for pack in pack_reference(share, num_ranks // num_nodes):
            slots += [int(experts[replicas[item]]) for item in pack]
    return slots


def loads_of(num_experts):
    """Float32 loads [L, E]: many ties, few, zeros in part, none but zeros, fractions."""
    generator = np.random.default_rng(num_experts)
    shape = (6, num_experts)
    tailed = generator.lognormal(0, 2, shape)
    kinds = [
        generator.integers(0, 3, shape),
        generator.integers(0, 1000, shape),
        np.rint(1000 * tailed),
        tailed,
        np.where(generator.random(shape) < 0.7, 0, tailed),
        np.zeros((1, num_experts)),
        np.full((1, num_experts), 0.1),
    ]
    return np.concatenate(kinds).astype(np.float32)


@pytest.mark.parametrize(
    "sizes",
    [
        *(FLAT[0], GROUPED[0], UNEQUAL[0]),
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in FLAT[1:] + GROUPED[1:]),
    ],
)
def test_plans_are_those_of_the_plain_program(sizes):
    num_experts, *rest = sizes
    load = loads_of(num_experts)
    assert plan_of(load, *rest).tolist() == [plan_reference(row, *rest) for row in load]


def test_the_published_example():
    # README of deepseek-ai/EPLB (MIT licence).
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    assert plan_of(load, 16, 8, num_nodes=2, num_groups=4).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_without_load_the_first_expert_gets_every_spare_slot():
    assert plan_of([[0, 0, 0, 0]], 8, 2).tolist() == [[0, 1, 2, 3, 0, 0, 0, 0]]


def test_two_replicas_of_an_expert_may_meet_on_a_rank():
    assert plan_of([[4, 4]], 4, 2).tolist() == [[0, 0, 1, 1]]


def test_equal_replicas_keep_the_order_of_their_slots():
    # The replicas are 0 1 2 0 1, of 2 tokens each save the 1 of expert 2.
    assert plan_of([[4, 4, 1]], 5, 1).tolist() == [[0, 1, 0, 1, 2]]


def test_rank_loads_are_added_up_in_float32():
    # 2^24 + 1 rounds to 2^24: rank 0 stays among the lightest until it is full.
    assert plan_of([[2**24, 2**24, 1, 1, 1, 1]], 6, 2).tolist() == [[0, 2, 3, 1, 4, 5]]


def test_groups_of_equal_load_stand_in_the_order_of_their_rounded_sums():
    # The groups hold the same numbers in other orders; one slot a rank shows the order of groups.
    # Expected: deepseek-ai/EPLB with PyTorch 2.13 on x86.
    parts = 1 / np.arange(1, 46, dtype=np.float32)
    load = np.concatenate([np.roll(parts, shift) for shift in (0, 19, 38, 57)])[None]
    slots = plan_of(load, load.size, load.size, num_groups=4)
    assert (slots[0, ::45] // 45).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 3, 1, 1), "16 slots cannot be divided among 3 ranks; use a multiple of 3"),
        ((8, 4, 1, 1), "8 slots cannot hold 12 experts; use at least 12"),
        ((16, 8, 1, 5), "12 experts cannot be divided into 5 groups; give the model's own"),
        ((20, 10, 4, 4), "10 ranks cannot be divided among 4 nodes; use a multiple of 4"),
        ((16, 8, 0, 4), "the number of nodes is 0; it must be at least 1"),
        ((16, 8, 1, 0), "the number of groups is 0; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(np.ones((1, 12)), *sizes)
