"""A pickle reader that can only build what it is told to.

A pickle is a program: it names callables and applies them. Here every name is looked up in a fixed
table; any other is refused, so nothing of the file's choosing is imported or called. What the
table holds is immutable, because a pickle may also set attributes.
"""

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# What a damaged pickle may raise: its opcodes then meet objects that they were not made for.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    ValueError,
    struct.error,
)


class PickleError(ValueError):
    """A fault whose message is complete, unlike the ValueError of, say, a damaged number."""


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        names: Mapping[tuple[str, str], Any],
        load_storage: Callable[[Any], Any] | None,
    ):
        super().__init__(file)
        self._path = path
        self._names = names
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise PickleError(
                f"{self._path}: refused to load {module}.{name}; only tensors, arrays and plain "
                "Python values are read from a pickle"
            )
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_storage is None:
            raise pickle.UnpicklingError("a persistent id outside a torch file")
        return self._load_storage(pid)


def load_pickle(
    file: BinaryIO,
    path: Path,
    names: Mapping[tuple[str, str], Any],
    load_storage: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle. `names` maps (module, name) to what stands for it here; the values must be
    immutable. `load_storage` answers persistent ids.

    Raises PickleError, a ValueError, naming `path` where the pickle is damaged or asks for a name
    that is not in the table.
    """
    try:
        return _Unpickler(file, path, names, load_storage).load()
    except PickleError:
        raise
    except _DAMAGE as error:
        raise PickleError(f"{path}: damaged pickle ({type(error).__name__}: {error})") from error


class PickledDtype:
    """Stands for a pickled `numpy.dtype`: a letter and a size, such as i8, and the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_flags: Any):
        self.code = code
        self.order: Any = "|"

    def __setstate__(self, state: Any):
        self.order = state[1]

    def dtype(self) -> np.dtype:
        name = f"{self.order}{self.code}"
        if not re.fullmatch(r"[<>=|][biuf]\d+", name):
            raise ValueError(f"dtype {name} is not read from a pickle")
        return np.dtype(name)


class PickledArray:
    """Stands for a pickled `numpy.ndarray`, held as plain values until `array` is called."""

    __slots__ = ("state",)

    def __init__(self):
        self.state: Any = None

    def __setstate__(self, state: Any):
        self.state = state

    def items(self) -> list:
        """The objects of an array of objects, in C order."""
        match self.state:
            case (_, tuple(), PickledDtype() as dtype, _, list() as values) if dtype.code == "O8":
                return values
        raise ValueError("not an array of objects")

    def array(self) -> np.ndarray:
        """The array of numbers, checked against its own bytes."""
        match self.state:
            case (_, tuple() as shape, PickledDtype() as dtype, by_column, bytes() as data):
                flat = np.frombuffer(data, dtype.dtype())
                return flat.reshape(shape, order="F" if by_column else "C")
        raise ValueError("not an array of numbers")


class _Callable:
    """A named function without attributes that a pickle could set."""

    __slots__ = ()


class _Reconstruct(_Callable):
    __slots__ = ()

    def __call__(self, *_kind: Any) -> PickledArray:
        return PickledArray()


class _Dtype(_Callable):
    __slots__ = ()

    def __call__(self, *args: Any) -> PickledDtype:
        return PickledDtype(*args)


class _Ndarray(_Callable):
    """Only ever named as the first argument of `_reconstruct`."""

    __slots__ = ()


# Before numpy 2 the private package was numpy.core.
NUMPY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _Dtype(),
    ("collections", "OrderedDict"): OrderedDict,
}
