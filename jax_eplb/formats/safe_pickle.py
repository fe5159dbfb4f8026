"""A pickle reader that can only build what it is told to.

A pickle is a program: it names callables and applies them. Here every name is looked up in a fixed
table; any other is refused, so nothing of the file's choosing is imported or called. What the
table holds is immutable, because a pickle may also set attributes.
"""

import io
import pickle
import pickletools
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

# Values that a pickle may have however short it is.
_MIN_VALUES = 1 << 20


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

    Raises PickleError, a ValueError, naming `path` where the pickle is damaged, asks for memory
    that its size does not account for, or for a name that is not in the table.
    """
    data = file.read()
    try:
        _check_sizes(data)
        return _Unpickler(io.BytesIO(data), path, names, load_storage).load()
    except PickleError:
        raise
    except _DAMAGE as error:
        raise PickleError(f"{path}: damaged pickle ({type(error).__name__}: {error})") from error


def _check_sizes(data: bytes) -> None:
    """Raise UnpicklingError where a few bytes would take much more memory, or time, than there are.

    The unpickler fills its memo up to the highest number that an opcode names, and reserves what a
    string is said to be long: genops reads the same opcodes, and no more than there is. And a tuple
    that holds another one twice, that a third one twice, and so on, has as many values as 2 to the
    power of its depth, each of which is visited where it becomes a key of a dict. So the opcodes
    are run here on counts of values alone.
    """
    if not data:
        raise EOFError("no pickle at all")
    limit = max(len(data), _MIN_VALUES)
    stack: list[int | None] = []  # the values in each object, None for a mark
    memo: dict[int, int | None] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else argument
            if place > len(data):
                raise pickle.UnpicklingError(f"memo number {place} in {len(data)} bytes")
            memo[place] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument or 0])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            values = _take(opcode, stack)
            if values > limit:
                raise pickle.UnpicklingError(f"{values} values in {len(data)} bytes")
            stack += [values] * len(opcode.stack_after)


def _take(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Take what the opcode takes from the stack; the values in it, and one more."""
    taken: list[int | None] = []
    fixed = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        fixed = opcode.stack_before.index(pickletools.markobject)
        while (top := stack.pop()) is not None:
            taken.append(top)
    taken += [stack.pop() for _ in range(fixed)]
    return 1 + sum(values or 0 for values in taken)


class PickledDtype:
    """Stands for a pickled `numpy.dtype`: a letter and a size, such as i8, and the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_flags: Any):
        self.code = code
        self.order: Any = "|"

    def __setstate__(self, state: Any):
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not (isinstance(self.order, str) and isinstance(self.code, str)):
            raise ValueError("a dtype whose name is no text")
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
