"""`rebalance`: every slot holds its expert afterwards, or the old placement is in force."""

import sys
from itertools import islice

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jax_eplb import HostCopy, expert_mesh, rebalance
from jax_eplb.moving import RebalanceError, find_banks, prepare_moves, staging
from tests.moving_cases import (
    assert_holds,
    in_slots,
    layer_trees,
    placement,
    put,
    stacked_tree,
    tables,
    tagged,
)
from tests.tiny_model import counted_compilations

pytestmark = pytest.mark.light_compile

L, E, S, RANKS = 2, 8, 12, 4
MODULE = sys.modules["jax_eplb.moving.rebalance"]  # the package has the function by this name


def drawn(count, seed=0, layers=L, experts=E, slots=S, ranks=RANKS):
    return list(islice(tables(seed, layers, experts, slots, ranks), count))


def of(table, experts=E, ranks=RANKS, layer_ids=None):
    return placement(table, experts, ranks, layer_ids)


def move_again_and_again(number, layers, experts, slots, ranks, *, seed, **options):
    """Random placements one after the other; all slots of all arrays are looked at each time."""
    sizes = {"layers": layers, "experts": experts, "slots": slots, "ranks": ranks}
    table, *others = drawn(number + 1, seed, **sizes)
    tree, before = stacked_tree(table, experts, expert_mesh(ranks)), of(table, experts, ranks)
    for table in others:
        after = of(table, experts, ranks)
        tree, before = rebalance(tree, before, after, **options), after
        assert_holds(tree, table, experts)


# Layers, experts, slots; of each layer a table of its own.
MANY = [
    (8, 6, 8, {"collective": True, "slots_at_once": 16}),
    (5, 16, 24, {"collective": True, "slots_at_once": 4}),
    (1, 8, 8, {}),
    (2, 8, 16, {"slots_at_once": 1}),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MANY[:2]]


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts", "slots", "options"), SLOW + MANY[2:])
def test_three_hundred_random_tables(layers, experts, slots, options):
    move_again_and_again(80 // layers, layers, experts, slots, 8, seed=layers, **options)


@pytest.mark.slow
def test_ten_thousand_random_tables():
    for (layers, experts, slots, options), number in zip(MANY, (1100, 100, 500, 100), strict=True):
        move_again_and_again(number, layers, experts, slots, 8, seed=number, **options)


@pytest.mark.slow
@pytest.mark.parametrize("slots_at_once", [1, 2, 8])
def test_every_form_of_parameters_and_any_bound(slots_at_once):
    old, new = drawn(2)
    mesh, ids = expert_mesh(RANKS), (3, 7)
    before, after = of(old, layer_ids=ids), of(new, layer_ids=ids)
    stacked = stacked_tree(old, E, mesh)
    moved = rebalance(stacked, before, after, slots_at_once=slots_at_once)
    assert_holds(moved, new, E)
    assert moved["router"] is stacked["router"]
    trees = layer_trees(old, E, mesh)
    moved = rebalance(trees, before, after, slots_at_once=slots_at_once)
    assert isinstance(moved, list)
    assert_holds(moved, new, E)
    one = layer_trees(old[:1], E, mesh)[0]
    moved = rebalance(one, of(old[:1]), of(new[:1]), slots_at_once=slots_at_once)
    assert_holds([moved], new[:1], E)


def test_cycles_longer_than_a_wave():
    generator = np.random.default_rng(0)
    old, new = (np.array([generator.permutation(16)] * 2) for _ in range(2))
    tree = stacked_tree(old, 16, expert_mesh(2))
    moved = rebalance(tree, of(old, 16, 2), of(new, 16, 2), slots_at_once=2)
    assert_holds(moved, new, 16)


def test_on_one_rank_every_array_goes_along_and_keeps_its_sharding():
    first, *others = drawn(6, ranks=1)
    tree, before = stacked_tree(first, E, expert_mesh(1)), of(first, ranks=1)

    def shardings(tree):
        return [x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]

    expected = shardings(tree)
    for table in others:
        tree, before = rebalance(tree, before, of(table, ranks=1)), of(table, ranks=1)
        assert_holds(tree, table, E)
        assert shardings(tree) == expected


def test_empty_slots_are_left_and_filled():
    old = np.array([[0, 1, 2, 3, 4, 5, 6, 7, E, E, E, E]])
    new = np.array([[E, 1, 2, 3, 4, 5, E, 7, 0, 1, 6, E]])
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    assert_holds(rebalance(tree, of(old), of(new)), new, E)


def test_no_change_gives_the_same_arrays():
    (table,) = drawn(1)
    tree = stacked_tree(table, E, expert_mesh(RANKS))
    assert rebalance(tree, of(table), of(table)) is tree


@pytest.mark.slow
def test_the_arrays_given_can_be_kept():
    old, new = drawn(2)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    moved = rebalance(tree, of(old), of(new), donate=False)
    assert_holds(moved, new, E)
    assert_holds(tree, old, E)


@pytest.mark.slow
def test_nothing_compiles_after_preparation():
    old, *others = drawn(6)
    tree, before = stacked_tree(old, E, expert_mesh(RANKS)), of(old)
    prepare_moves(tree, 2, banks=find_banks(tree))
    with counted_compilations() as compiled:
        for new in others:
            tree, before = rebalance(tree, before, of(new), slots_at_once=2), of(new)
    assert compiled == []
    assert_holds(tree, new, E)


def test_no_wave_moves_more_than_its_bound(monkeypatch):
    old, new = drawn(2, slots=24)
    staged = []
    stage = MODULE.stage_moves

    def watched(params, moves, **options):
        staged.append(stage(params, moves, **options))
        return staged[-1]

    monkeypatch.setattr(MODULE, "stage_moves", watched)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    rebalance(tree, of(old), of(new), slots_at_once=2)
    assert len(staged) > 2
    rows = sum(x.nbytes for x in [*tree["experts"].values(), tree["moments"]["mu"]]) // (L * 24)
    for one in staged:
        assert sum(x.nbytes for x in one.arrays()) <= 2 * RANKS * rows


class Model(nnx.Module):
    def __init__(self, trees, router):
        self.layers = nnx.List([nnx.Dict(jax.tree.map(nnx.Param, tree)) for tree in trees])
        self.router = nnx.Param(router)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # for optax
@jax.numpy_rank_promotion("allow")
def test_a_flax_models_state_and_its_optimisers_move_together():
    old, new = drawn(2)
    mesh = expert_mesh(RANKS)
    values = [tagged(1, E, (2, 3), np.float32, salt)[0] for salt in range(L)]
    trees = [
        {"up": put(in_slots(x[None], row[None])[0], mesh, "expert")}
        for x, row in zip(values, old, strict=True)
    ]
    model = Model(trees, put(np.ones((3, E), np.float32), mesh))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before, after = of(old), of(new)

    def loss(model):
        return sum((layer["up"][...] ** 2).sum() for layer in model.layers)

    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
    graph, state = nnx.split((model, optimizer))
    expected = jax.tree.map(np.asarray, state)
    model, optimizer = nnx.merge(graph, rebalance(state, before, after))

    def check(path, moved, was):
        keys = [getattr(key, "key", None) for key in path]
        if "layers" in keys:
            layer = keys[keys.index("layers") + 1]
            by_expert = np.zeros((E, *was.shape[1:]), was.dtype)
            by_expert[old[layer]] = was
            was = by_expert[new[layer]]
        np.testing.assert_array_equal(moved, was)

    changed = nnx.split((model, optimizer))[1]
    jax.tree.map_with_path(check, changed, expected)
    banks = find_banks(changed, num_slots=S, layer_ids=(0, 1))
    assert [len(group.leaves) for group in banks.groups] == [3, 3]  # weights and both moments
    optimizer.update(model, nnx.grad(loss)(model))  # and training goes on


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("step", range(0, 9, 2))
def test_a_failure_leaves_the_old_placement_in_force(monkeypatch, step, collective):
    generator = np.random.default_rng(step)
    old, new = (np.array([generator.permutation(12) for _ in range(2)]) for _ in range(2))
    for name in ("stage_moves", "stage_held", "hold_row"):
        fail_at(monkeypatch, name, steps := {"left": step})
    tree = stacked_tree(old, 12, expert_mesh(2))
    with pytest.raises(RebalanceError, match=r"Broken: no memory.*old placement is in force") as e:
        rebalance(tree, of(old, 12, 2), of(new, 12, 2), slots_at_once=2, collective=collective)
    assert steps
    assert_holds(e.value.params, old, 12)


def fail_at(monkeypatch, name, steps, module=MODULE):
    """Let the step that so many go before fail, and none after it."""
    whole = getattr(module, name)

    def failing(*args, **options):
        steps["left"] -= 1
        if steps["left"] == -1:
            raise Broken("no memory")
        return whole(*args, **options)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("step", range(4))
def test_a_failure_between_layers_leaves_the_old_placement_in_force(monkeypatch, step):
    old, new = drawn(2)
    fail_at(monkeypatch, "write_rows", {"left": step}, module=staging)
    trees = layer_trees(old, E, expert_mesh(RANKS))
    with pytest.raises(RebalanceError, match=r"no memory.*old placement is in force") as caught:
        rebalance(trees, of(old), of(new), slots_at_once=2)
    assert_holds(caught.value.params, old, E)


def test_weights_that_are_used_up_are_lost_and_said_to_be(monkeypatch):
    old, new = drawn(2)
    write = staging.write_rows

    def failing(*args, **options):
        write(*args, **options)
        raise Broken("after the banks were given away")

    monkeypatch.setattr(staging, "write_rows", failing)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    with pytest.raises(RebalanceError, match=r"the weights are lost; place them anew") as caught:
        rebalance(tree, of(old), of(new))
    assert caught.value.params is None


def test_a_failure_while_the_arrays_are_kept_gives_them_back(monkeypatch):
    old, new = drawn(2)
    fail_at(monkeypatch, "stage_moves", {"left": 1})
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    with pytest.raises(RebalanceError, match="are as they were") as caught:
        rebalance(tree, of(old), of(new), slots_at_once=1, donate=False)
    assert caught.value.params is tree
    assert_holds(tree, old, E)


def test_when_moving_back_fails_too_the_error_says_that_weights_are_lost(monkeypatch):
    old, new = drawn(2)
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise Broken("no memory")
        return stage(*args, **options)

    stage = MODULE.stage_moves
    monkeypatch.setattr(MODULE, "stage_moves", failing)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    with pytest.raises(RebalanceError, match=r"Moving back failed too.*lost") as caught:
        rebalance(tree, of(old), of(new), slots_at_once=1)
    assert caught.value.params is None


def test_a_lost_rank_is_filled_from_the_host_copy():
    old, new = drawn(2)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    copy = HostCopy(tree, of(old))
    assert_holds(rebalance(tree, of(old), of(new), lost_ranks=[1], host=copy), new, E)
    tree = stacked_tree(old, E, expert_mesh(RANKS))
    with pytest.raises(
        ValueError, match=r"layer 4: no slot holds experts \[.*ranks \[1\] are lost"
    ):
        rebalance(tree, of(old, layer_ids=(4, 5)), of(new, layer_ids=(4, 5)), lost_ranks=[1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (of([[0, 1]], 2, 2), of([[0, 1, 1, 0]], 2, 2), "slots 2, the new one 4"),
        (of([[0, 1]], 2, 2), of([[0, 1]], 2, 1), "ranks 2, the new one 1"),
        (of([[0, 1]], 2, 2), of([[0, 1]], 3, 2), "experts 2, the new one 3"),
        (of([[0, 1]], 2, 2), of([[0, 1]], 2, 2, [4]), r"layer ids \(0,\), the new one \(4,\)"),
        (of([[0, 1]], 2, 1), of([[1, 0]], 2, 1), "for 1 ranks; the expert axis.*has 2"),
        (
            of([[0, 1]], 2, 2),
            of([[0, 3]], 2, 2),
            "new placement, layer 0, slot 1: unknown expert 3",
        ),
        (of([[0, 1]], 2, 2), of([[1, 1]], 2, 2), r"layer 0: experts \[0\] have no slot"),
    ],
)
def test_placements_that_do_not_fit_are_refused(old, new, message):
    tree = {"a": put(np.arange(2.0, dtype=np.float32), expert_mesh(2), "expert")}
    with pytest.raises(ValueError, match=message):
        rebalance(tree, old, new)
    np.testing.assert_array_equal(tree["a"], [0, 1])


def test_layers_without_banks_and_bounds_of_nothing_are_refused():
    old, new = drawn(2)
    trees = {"layers": {3: layer_trees(old, E, expert_mesh(RANKS))[0]}}
    with pytest.raises(ValueError, match=r"no bank of the layers \[5\]"):
        rebalance(trees, of(old, layer_ids=(3, 5)), of(new, layer_ids=(3, 5)))
    with pytest.raises(ValueError, match="slots_at_once is 0"):
        rebalance(stacked_tree(old, E, expert_mesh(RANKS)), of(old), of(new), slots_at_once=0)
