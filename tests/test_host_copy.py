"""The host copy: every expert is there, from whichever source, and comes back bit for bit."""

import jax
import numpy as np
import pytest

from jax_eplb import HostCopy, expert_mesh, rebalance
from jax_eplb.moving import find_banks, host_copy
from tests.moving_cases import (
    assert_holds,
    in_expert_order,
    layer_trees,
    placement,
    put,
    stacked_tree,
    tables,
)

pytestmark = pytest.mark.light_compile

L, E, S, RANKS = 2, 8, 12, 4
OLD, NEW = next(tables(0, L, E, S, RANKS)), next(tables(1, L, E, S, RANKS))
BEFORE, AFTER = placement(OLD, E, RANKS), placement(NEW, E, RANKS)
ALL = range(RANKS)


def by_expert():
    """The tree with its banks in expert order, as a checkpoint has them."""
    whole = in_expert_order(L, E)
    moments = {"mu": whole.pop("bias"), "count": 0}
    return {"experts": whole, "router": np.zeros(1), "moments": moments, "nothing": None}


@pytest.mark.parametrize("source", ["devices", "expert order"])
def test_all_ranks_can_be_filled_from_the_host_alone(source):
    tree = stacked_tree(OLD, E, expert_mesh(RANKS))
    if source == "devices":
        copy = HostCopy(tree, BEFORE)
    else:
        copy = HostCopy.from_experts(by_expert(), tree, BEFORE)
    damaged = stacked_tree(np.full_like(OLD, E), E, expert_mesh(RANKS))
    assert_holds(rebalance(damaged, BEFORE, AFTER, lost_ranks=ALL, host=copy), NEW, E)


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_memory_is_used_where_there_is_any(monkeypatch, pinned):
    if not pinned:
        monkeypatch.setattr(host_copy, "_pins", lambda device: False)
    trees = layer_trees(OLD, E, expert_mesh(RANKS))
    copy = HostCopy(trees, BEFORE)
    banks = find_banks(trees, num_slots=S, layer_ids=(0, 1))
    piece = copy.row(banks, 1, 1, 0)[0][0]
    if pinned:
        assert isinstance(piece, jax.Array)
        assert piece.sharding.memory_kind == "pinned_host"
    else:
        assert isinstance(piece, np.ndarray)
    assert_holds(rebalance(trees, BEFORE, AFTER, lost_ranks=[0, 3], host=copy), NEW, E)


def test_parts_of_experts_go_to_the_devices_that_hold_them():
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    old, new = next(tables(0, 1, 4, 6, 2)), next(tables(1, 1, 4, 6, 2))
    before, after = placement(old, 4, 2), placement(new, 4, 2)
    whole = np.arange(4 * 4 * 2, dtype=np.float32).reshape(4, 4, 2)
    for given in (None, [whole, whole]):
        tree = [
            put(whole[old[0]], mesh, "expert", "tensor"),
            put(whole[old[0]], mesh, "expert", None, "tensor"),
        ]
        if given is None:
            copy = HostCopy(tree, before)
        else:
            copy = HostCopy.from_experts(given, tree, before)
        moved = rebalance(tree, before, after, lost_ranks=[0, 1], host=copy)
        for bank in moved:
            np.testing.assert_array_equal(bank, whole[new[0]])


def test_no_rank_is_read_much_more_than_another():
    reads = host_copy._holders_to_read(OLD, BEFORE)
    counts = [sum(len(of_layer) for of_layer in of_rank) for of_rank in reads]
    assert sum(counts) == L * E
    assert max(counts) <= min(counts) + 2


def test_a_copy_of_other_banks_and_of_missing_experts_is_refused():
    tree = stacked_tree(OLD, E, expert_mesh(RANKS))
    copy = HostCopy(tree, BEFORE)
    other = {"only": tree["experts"]["down"]}
    with pytest.raises(ValueError, match="made of a tree with other banks"):
        copy.row(find_banks(other), 0, 0, 0)
    table = OLD.copy()
    table[1][table[1] == 5] = 4
    with pytest.raises(ValueError, match="layer 1: expert 5 has no slot to be copied from"):
        HostCopy(tree, placement(table, E, RANKS))
