"""Names of a pytree's leaves, as Orbax writes them: the keys of the path, joined by dots."""

from typing import Any, NamedTuple

import jax


class Key(NamedTuple):
    """One step of a path: a name, or the index of a list or tuple."""

    text: str
    is_index: bool = False


def joined(keys: tuple[Key, ...]) -> str:
    return ".".join(key.text for key in keys)


def named_leaves(tree: Any) -> dict[tuple[Key, ...], Any]:
    """The leaves of a tree by path.

    Raises ValueError for a bare array, a name that a file cannot have, or one that stands twice.

    >>> list(named_leaves({"a": [1, 2]}))[1]
    (Key(text='a', is_index=False), Key(text='1', is_index=True))
    """
    leaves = {_keys(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}
    seen: set[str] = set()
    for keys in leaves:
        name = joined(keys)
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"an array named {name!r} cannot be saved; give each a plain name")
        if name in seen:
            raise ValueError(f"two arrays are named {name!r} when their keys are joined by dots")
        seen.add(name)
    return leaves


def empty_nodes(tree: Any) -> dict[tuple[Key, ...], str]:
    """The nodes that hold nothing, by path, with the kind that Orbax calls them."""

    def is_end(node) -> bool:
        return node is None or (isinstance(node, dict | list | tuple) and not node)

    found = {}
    for path, node in jax.tree.flatten_with_path(tree, is_leaf=is_end)[0]:
        if is_end(node):
            kind = "None" if hasattr(node, "_fields") else type(node).__name__
            found[_keys(path)] = {"NoneType": "None"}.get(kind, kind.capitalize())
    return found


def _keys(path) -> tuple[Key, ...]:
    return tuple(_key(entry) for entry in path)


def _key(entry: Any) -> Key:
    if isinstance(entry, jax.tree_util.SequenceKey):
        return Key(str(entry.idx), True)
    for attribute in ("key", "name"):
        if hasattr(entry, attribute):
            return Key(str(getattr(entry, attribute)))
    raise ValueError(f"{entry!r} in the path of an array has no name; use dicts, lists or tuples")
