"""Which arrays of a tree are banks of expert weights: those with a slot axis over the expert axis.

Axes: L layers, S slots, P ranks, N = S / P slots of a rank. A layer's bank is [S, …], a stack of
layers' is [L, S, …]. Weights, biases, scales and the moments of an optimiser are all alike.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# From the path of a leaf, as `jax.tree.flatten_with_path` gives it, to the position of its layer.
LayerOf = Callable[[tuple[Any, ...]], int]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the banks of a group lie on the mesh; static."""

    mesh: Mesh
    axis_name: str
    stacked: bool
    inner: tuple[P, ...]  # of each bank: how the axes after the slot axis are spread

    @property
    def banks(self) -> list[Any]:
        before = (None, self.axis_name) if self.stacked else (self.axis_name,)
        return [P(*before, *spec) for spec in self.inner]

    @property
    def rows(self) -> list[Any]:
        """Of arrays [P·B, …] that hold B rows of each rank."""
        return [P(self.axis_name, *spec) for spec in self.inner]

    @property
    def num_ranks(self) -> int:
        return self.mesh.shape[self.axis_name]


@dataclasses.dataclass(frozen=True)
class Group:
    """Banks whose rows travel together: of all layers, stacked, or of one layer."""

    leaves: tuple[int, ...]  # where they stand among the leaves of the tree
    layer: int | None  # its position among the layers; None where all are stacked
    spread: Spread


@dataclasses.dataclass(frozen=True)
class Banks:
    """The banks of a tree. Found once, it saves `stage_moves` the search."""

    groups: tuple[Group, ...]
    num_slots: int
    structure: Any  # of the tree

    @property
    def num_ranks(self) -> int:
        return self.groups[0].spread.num_ranks

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    def leaves(self, params) -> list[Any]:
        """The leaves of a tree of the same structure. Raises ValueError for another one."""
        leaves, structure = jax.tree.flatten(params)
        if structure != self.structure:
            raise ValueError(
                f"the tree has the structure {structure}; its banks were found in one of the "
                f"structure {self.structure}"
            )
        return leaves


def find_banks(
    params,
    *,
    num_slots: int | None = None,
    layer_ids: Sequence[int] | None = None,
    axis_name: str = "expert",
    layer_of: LayerOf | None = None,
) -> Banks:
    """Find the arrays whose sharding names the expert axis for axis 0, or for axis 1 if stacked.

    Arrays of axis 0 belong to one layer. Which, where there are several: what `layer_of(path)`
    says; else its position in a list or tuple of as many trees as there are layers; else the last
    integer of the path that is one of `layer_ids`, the model's own numbers. Everything else in the
    tree is left alone: arrays without the expert axis, or with another size there than S.

    What `jit` makes may not name an axis of one device: where there is one rank, put the name back
    with `jax.device_put`.

    Raises ValueError where there is no bank; only some of one rank's name the axis; the layer of
    one cannot be told (so in a tuple of parameters and an optimiser's state, of a model with two
    layers: give `layer_of`); or banks are on different meshes.
    """
    flat, structure = jax.tree.flatten_with_path(params)
    found = [
        (i, path, *place) for i, (path, x) in enumerate(flat) if (place := _place(x, axis_name))
    ]
    if num_slots is None and found:
        axis = max(place[2] for place in found)  # stacked banks, if there are any
        num_slots = next(flat[i][1].shape[axis] for i, _, a, _ in found if a == axis)
    num_layers = None if layer_ids is None else len(layer_ids)

    def fits(axis, shape):
        return shape[axis] == num_slots and (axis == 0 or num_layers in (None, shape[0]))

    banks = [x for x in found if fits(x[2], flat[x[0]][1].shape)]
    position = _how_layers_are_told(params, [x[1] for x in banks if x[2] == 0], layer_ids, layer_of)
    groups: dict[int | None, list] = {}
    for index, path, axis, inner in banks:
        groups.setdefault(None if axis else position(path), []).append((index, inner))
    _check_named(flat, banks, axis_name)
    if not groups:
        shapes = [f"{jax.tree_util.keystr(path)} {flat[i][1].shape}" for i, path, *_ in found]
        wanted = "(S, …) or (L, S, …)" if num_slots is None else f"{num_slots} slots"
        raise ValueError(
            f"no array is a bank of {wanted} with the slot axis spread over {axis_name!r} "
            f"(arrays spread over it: {', '.join(shapes) or 'none'}); shard the slot axis with "
            f"NamedSharding(mesh, PartitionSpec({axis_name!r})), and use the placement in force"
        )
    return Banks(
        tuple(_group(flat, layer, members, axis_name) for layer, members in groups.items()),
        num_slots or 0,
        structure,
    )


def _check_named(flat, found, axis_name: str) -> None:
    """Raise ValueError where one rank has banks that name the axis, and others like them do not.

    Like a bank is what stands beside it with as many slots, or has its shape.
    """
    if not found or flat[found[0][0]][1].sharding.mesh.shape[axis_name] > 1:
        return
    named = {index for index, *_ in found}
    banks = [(path[:-1], flat[index][1].shape, axis + 1) for index, path, axis, _ in found]
    for index, (path, x) in enumerate(flat):
        if index in named or not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jnp.integer):
            continue
        for beside, shape, slots in banks:
            as_many = x.ndim > slots and x.shape[:slots] == shape[:slots]
            if x.shape == shape or (as_many and path[:-1] == beside):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} {x.shape} may be a bank, but its sharding does "
                    f"not name {axis_name!r}, as others do; on one rank, what `jit` makes may not: "
                    "put all banks there with jax.device_put(x, NamedSharding(mesh, "
                    f"PartitionSpec({axis_name!r})))"
                )


def _place(x, axis_name: str):
    """(slot axis, spec of the axes after it) where an array has the expert axis first or second."""
    if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
        return None
    spec = [*x.sharding.spec]
    for axis, names in enumerate(spec[:2]):
        if names == axis_name or names == (axis_name,):
            if axis == 1 and spec[0] is not None:
                return None
            return axis, P(*spec[axis + 1 :])
    return None


def _how_layers_are_told(
    params, paths: list[Any], layer_ids: Sequence[int] | None, layer_of: LayerOf | None
) -> LayerOf:
    """From the path of a bank of one layer to the layer's position."""
    ids = None if layer_ids is None else list(layer_ids)
    if ids is not None and len(ids) == 1:
        return lambda path: 0
    if layer_of is not None:
        return layer_of
    if type(params) in (list, tuple) and (ids is None or len(params) == len(ids)):
        _check_positions(params, paths, ids or [])
        return lambda path: path[0].idx

    def by_number(path):
        position = _layer_named(path, ids or [])
        if position is None:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is a bank of one layer, but of which? The layers "
                f"are {ids}; give `layer_of`, from a path to the position of its "
                "layer"
            )
        return position

    return by_number


def _layer_named(path, layer_ids: list[int]) -> int | None:
    """The position of the layer whose number stands last in the path, if one does."""
    for key in reversed(path):
        found = re.search(r"\d+(?=\D*$)", jax.tree_util.keystr((key,)))
        if found and int(found.group()) in layer_ids:
            return layer_ids.index(int(found.group()))
    return None


def _check_positions(trees, paths: list[Any], layer_ids: list[int]) -> None:
    """Raise ValueError where trees, as many as there are layers, each seem to hold all layers."""
    named: dict[int, set[int | None]] = {}
    for path in paths:
        named.setdefault(path[0].idx, set()).add(_layer_named(path[1:], layer_ids))
    every = set(range(len(layer_ids)))
    if every and named and all(layers == every for layers in named.values()):
        raise ValueError(
            f"a {type(trees).__name__} of {len(trees)} trees, and {len(layer_ids)} layers: is each "
            "tree a layer, or are all layers in each, as "
            f"{jax.tree_util.keystr(paths[0])} sounds? Give `layer_of`, from a path to the "
            "position of its layer; `lambda path: path[0].idx` if each is one"
        )


def _group(flat, layer, members, axis_name) -> Group:
    arrays = [flat[index][1] for index, _ in members]
    meshes = {array.sharding.mesh for array in arrays}
    if len(meshes) > 1:
        raise ValueError(f"the banks of a layer are on different meshes: {meshes}; use one")
    spread = Spread(meshes.pop(), axis_name, layer is None, tuple(inner for _, inner in members))
    return Group(tuple(index for index, _ in members), layer, spread)


@functools.lru_cache
def columns(mesh: Mesh, axis_name: str) -> np.ndarray:
    """Devices [P, others]: those of a rank, and beside each other those that hold the same part."""
    axis = mesh.axis_names.index(axis_name)
    return np.moveaxis(mesh.devices, axis, 0).reshape(mesh.devices.shape[axis], -1)
