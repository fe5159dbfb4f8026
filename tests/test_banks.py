"""Which arrays of a tree go along when experts move, and of which layer they are."""

import jax
import numpy as np
import pytest
from flax import nnx

from jax_eplb import expert_mesh
from jax_eplb.moving import find_banks
from tests.moving_cases import layer_trees, put, stacked_tree, tables

pytestmark = pytest.mark.light_compile

L, E, S, RANKS = 2, 8, 12, 4
TABLE = next(tables(0, L, E, S, RANKS))


def paths(tree, banks):
    """The paths of the banks of each layer; None for stacked ones."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {g.layer: [jax.tree_util.keystr(flat[i][0]) for i in g.leaves] for g in banks.groups}


def test_stacked_banks_are_found_wherever_they_stand():
    tree = stacked_tree(TABLE, E, expert_mesh(RANKS))
    banks = find_banks(tree)
    assert paths(tree, banks) == {
        None: [
            "['experts']['down']",
            "['experts']['gate_up']",
            "['experts']['scale']",
            "['moments']['mu']",
        ]
    }
    assert (banks.num_slots, banks.num_ranks, banks.slots_per_rank) == (S, RANKS, 3)


def test_trees_of_a_list_are_layers_in_their_order():
    trees = layer_trees(TABLE, E, expert_mesh(RANKS))
    banks = find_banks(trees, num_slots=S, layer_ids=(3, 4))
    assert [group.layer for group in banks.groups] == [0, 1]
    assert [group.layer for group in find_banks(trees).groups] == [0, 1]
    (only,) = find_banks(trees[0], num_slots=S, layer_ids=(7,)).groups
    assert only.layer == 0


def test_layers_inside_a_tree_go_by_the_models_own_numbers():
    trees = layer_trees(TABLE, E, expert_mesh(RANKS))
    tree = {"layers": {3: trees[0], 4: trees[1]}, "adam": ({"layer_3": trees[0]["bias"]},)}
    found = paths(tree, find_banks(tree, num_slots=S, layer_ids=(3, 4)))
    assert "['adam'][0]['layer_3']" in found[0]
    assert len(found[0]) == 5
    assert len(found[1]) == 4
    other = {"first": trees[1], "second": trees[0]}
    order = ["second", "first"]
    chosen = find_banks(
        other, num_slots=S, layer_ids=(3, 4), layer_of=lambda path: order.index(path[0].key)
    )
    assert all("second" in path for path in paths(other, chosen)[0])
    with pytest.raises(ValueError, match=r"bank of one layer, but of which.*\[3, 4\].*layer_of"):
        find_banks(other, num_slots=S, layer_ids=(3, 4))


def test_a_tuple_of_whole_models_is_not_taken_for_its_layers():
    first, second = layer_trees(TABLE, E, expert_mesh(RANKS))
    model = {"layer_3": {"up": first["down"]}, "layer_4": {"up": second["down"]}}
    both = (model, {"mu": model, "count": 0})
    with pytest.raises(ValueError, match=r"a tuple of 2 trees, and 2 layers.*\['layer_3'\].*Give"):
        find_banks(both, num_slots=S, layer_ids=(3, 4))
    banks = find_banks(
        both,
        num_slots=S,
        layer_ids=(3, 4),
        layer_of=lambda path: ("layer_3", "layer_4").index(path[-2].key),
    )
    names = paths(both, banks)
    assert names[0] == ["[0]['layer_3']['up']", "[1]['mu']['layer_3']['up']"]
    assert names[1] == ["[0]['layer_4']['up']", "[1]['mu']['layer_4']['up']"]
    # One that has no banks beside it, and more of them than there are layers.
    with pytest.raises(ValueError, match="a list of 2 trees"):
        find_banks([model, {"count": 0}], num_slots=S, layer_ids=(3, 4))
    three = (model, {"mu": model, "nu": model}, 0)
    assert [len(g.leaves) for g in find_banks(three, num_slots=S, layer_ids=(3, 4)).groups] == [
        3,
        3,
    ]


class Model(nnx.Module):
    """A user's own module, of two layers and what stands between them."""

    def __init__(self, trees, router):
        self.layers = nnx.List([nnx.Dict(jax.tree.map(nnx.Param, tree)) for tree in trees])
        self.router = nnx.Param(router)


def test_a_flax_modules_state_is_a_tree_like_any_other():
    mesh = expert_mesh(RANKS)
    model = Model(layer_trees(TABLE, E, mesh), put(np.zeros((3, E), np.float32), mesh))
    _, state = nnx.split(model)
    found = paths(state, find_banks(state, num_slots=S, layer_ids=(0, 1)))
    assert {layer: len(names) for layer, names in found.items()} == {0: 4, 1: 4}
    assert all("layers" in name for name in found[0])


def test_arrays_of_other_sizes_on_the_expert_axis_are_left_alone():
    mesh = expert_mesh(RANKS)
    tree = stacked_tree(TABLE, E, mesh)
    tree["embedding"] = put(np.zeros((8, 3), np.float32), mesh, "expert")
    tree["cache"] = put(np.zeros((L + 1, S, 3), np.float32), mesh, None, "expert")
    banks = find_banks(tree, num_slots=S, layer_ids=(0, 1))
    assert [len(group.leaves) for group in banks.groups] == [4]


def test_no_bank_and_two_meshes_are_refused():
    mesh = expert_mesh(RANKS)
    with pytest.raises(ValueError, match=r"no array is a bank of 16 slots.*\(2, 12, 2, 5\)"):
        find_banks(stacked_tree(TABLE, E, mesh), num_slots=16, layer_ids=(0, 1))
    with pytest.raises(ValueError, match="spread over it: none"):
        find_banks({"a": np.zeros(3)})
    other = jax.sharding.Mesh(np.array(jax.devices()[4:]), ("expert",))
    mixed = [stacked_tree(TABLE, E, mesh), stacked_tree(TABLE, E, other)]
    with pytest.raises(ValueError, match="different meshes"):
        find_banks(mixed, num_slots=S, layer_ids=(0, 1))


def test_on_one_rank_no_bank_is_overlooked_because_its_sharding_does_not_name_the_axis():
    def tree_on(mesh):
        tree = stacked_tree(TABLE, E, mesh)
        tree["experts"]["ids"] = put(np.zeros((L, S, 2), np.int32), mesh)
        return tree | {"attention": put(np.zeros((L, S, 7), np.float32), mesh)}

    def unnamed(x):
        return put(np.asarray(x), x.sharding.mesh)

    for name, place in (("bias", "experts"), ("mu", "moments")):
        for ranks in (1, RANKS):
            tree = tree_on(expert_mesh(ranks))
            assert [len(group.leaves) for group in find_banks(tree, num_slots=S).groups] == [4]
            source = tree["experts"]["gate_up"]
            tree[place][name] = unnamed(source[..., 0] if name == "bias" else source)
            if ranks > 1:  # an array that all ranks have is no bank
                find_banks(tree, num_slots=S)
                continue
            with pytest.raises(ValueError, match=rf"'{name}'\] \(2, 12, .* may be a bank.*put all"):
                find_banks(tree, num_slots=S, layer_ids=(0, 1))


def test_a_tree_of_another_structure_is_refused():
    banks = find_banks(stacked_tree(TABLE, E, expert_mesh(RANKS)))
    with pytest.raises(ValueError, match="its banks were found in one of the structure"):
        banks.leaves({"a": 1})
