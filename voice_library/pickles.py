"""Reads a pickle as data: nothing in it is ever called.

A pickle is a program, and restricting which names Python's own unpickler may look up still leaves it to run
the rest: numpy's `__setstate__` on whatever state it is given, attributes set on whatever was named, a memo
as long as the file says, the hash of a key that contains itself a thousand times over. So these files are
not unpickled. Their steps are read one by one, those that build plain containers are carried out, and a call
is only written down (`Call`). What is written down is then looked at for numpy arrays of plain numbers, in
the few forms that numpy 1 and 2 write them.
"""

from __future__ import annotations

import math
import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 10_000
"""A dict with an array and its facts takes about a hundred; ten thousand are something else."""

_MAX_DIMENSIONS = 4

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_ARRAY, _DTYPE, _ENCODE = ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")
_RECONSTRUCT = frozenset((module, "_reconstruct") for module in _MULTIARRAY)
_SCALAR = frozenset((module, "scalar") for module in _MULTIARRAY)
_FROM_BUFFER = frozenset((module, "_frombuffer") for module in _NUMERIC)
_DICTS = frozenset({("collections", "OrderedDict")})
_NAMES = _RECONSTRUCT | _SCALAR | _FROM_BUFFER | _DICTS | {_ARRAY, _DTYPE, _ENCODE}
"""What may be named at all: the words numpy's own pickles are made of. Naming calls nothing."""

_NUMBER_TYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
_ORDERS = {"<": "<", ">": ">", "|": "|", "=": "<"}


class PickleError(Exception):
    """The pickle is damaged, or holds more than arrays and plain containers; the message says what."""


@dataclass(eq=False)
class Call:
    """A call that the pickle asks for and that nobody makes.

    Args:
        name: (module, name) of what it would call.
        args: with what.
        state: what it would then set on the result.
    """

    name: tuple[str, str]
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class _Name:
    path: tuple[str, str]


def read_pickle(data: bytes) -> Any:
    """Read a pickle into numbers, text, bytes, lists, tuples, dicts with text keys, and `Call`s among them.

    Raises:
        PickleError: it names anything but numpy's array constructors, or takes a step that these do not need.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_STEPS:
                raise PickleError(f"takes more than {MAX_STEPS} steps: not an array and its facts")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleError(f"takes the step {opcode.name}, which arrays and plain containers do not need")
            step(machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError, OverflowError) as error:
        raise PickleError("damaged: not a whole pickle") from error
    return machine.result


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None
        self._marks: list[int] = []

    def nothing(self, _: object) -> None:
        """Protocol and frame headers."""

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_bytes(self, value: bytes | bytearray) -> None:
        self.stack.append(bytes(value))

    def mark(self, _: object) -> None:
        self._marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        if count > len(self.stack):
            raise IndexError(count)
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of_marked(self, _: object) -> None:
        self.push(tuple(self.since_mark()))

    def list_of_marked(self, _: object) -> None:
        self.push(self.since_mark())

    def append(self, _: object) -> None:
        self._extend(self.take(1))

    def appends(self, _: object) -> None:
        self._extend(self.since_mark())

    def _extend(self, items: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError(type(target))
        target.extend(items)

    def dict_of_marked(self, _: object) -> None:
        items = self.since_mark()
        self.push({})
        self._set(items)

    def set_item(self, _: object) -> None:
        self._set(self.take(2))

    def set_items(self, _: object) -> None:
        self._set(self.since_mark())

    def _set(self, items: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError(type(target))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # whose hash is as cheap as it is long
                raise PickleError(f"has a key that is a {type(key).__name__}, not text")
            target[key] = value

    def global_name(self, words: str) -> None:
        self._push_name(*words.split(" ", 1))

    def stack_global(self, _: object) -> None:
        self._push_name(*self.take(2))

    def _push_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):  # of anything else, even printing may not end
            raise PickleError("names something by other than text")
        if (module, name) not in _NAMES:
            raise PickleError(f"names {f'{module}.{name}'[:80]!r}, which is no part of a numpy array")
        self.push(_Name((module, name)))

    def reduce(self, _: object) -> None:
        name, args = self.take(2)
        if not isinstance(name, _Name) or not isinstance(args, tuple):
            raise TypeError(type(name))
        is_dict = name.path in _DICTS and not args
        self.push({} if is_dict else Call(name.path, args))

    def build(self, _: object) -> None:
        (state,) = self.take(1)
        call = self.stack[-1]
        if not isinstance(call, Call) or call.state is not None:
            raise PickleError("sets the state of something that is not a new array")
        call.state = state

    def stop(self, _: object) -> None:
        (self.result,) = self.take(1)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(machine.take(count))


def _constant(value: object) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.nothing),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"), _Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push_bytes),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "MARK": _Machine.mark,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": _Machine.list_of_marked,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": _Machine.dict_of_marked,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
}
"""By name in `pickletools`. Not here, and so refused: making instances (INST, OBJ, NEWOBJ), persistent ids,
extension codes, out-of-band buffers, sets, DUP and POP, and the text steps of protocols 0 and 1, which Python 3
writes only when told to."""


# ------------------------------------------------------------------------------------ what it means


def is_array(value: object) -> bool:
    """Whether a value read from a pickle stands for a numpy array."""
    return isinstance(value, Call) and (value.name in _RECONSTRUCT or value.name in _FROM_BUFFER)


def to_array(value: object) -> NDArray:
    """The numpy array that a value stands for; a view of the pickle's own bytes, so read-only.

    Raises:
        PickleError: it is none, or one of objects, records or text.
    """
    if not isinstance(value, Call):
        raise PickleError(f"expected a numpy array, got {type(value).__name__}")
    try:
        if value.name in _FROM_BUFFER:
            data, dtype, shape, order = value.args
        elif value.name in _RECONSTRUCT:
            _, shape, dtype, is_fortran, data = value.state
            order = "F" if is_fortran else "C"
        else:
            raise PickleError(f"expected a numpy array, got {'.'.join(value.name)}")
        return _array(_to_bytes(data), _to_dtype(dtype), shape, order)
    except (TypeError, ValueError) as error:
        raise PickleError("holds a numpy array of an unknown form") from error


def to_number(value: object) -> float | int | None:
    """The number that a value stands for, numpy's own included; None when it is no number.

    Raises:
        PickleError: it is a numpy scalar of an unknown form.
    """
    if isinstance(value, Call) and value.name in _SCALAR and len(value.args) == 2:
        dtype, data = _to_dtype(value.args[0]), _to_bytes(value.args[1])
        if len(data) != dtype.itemsize:
            raise PickleError("holds a numpy number of an unknown form")
        number: float | int = np.frombuffer(data, dtype)[0].item()
        return number
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None  # type: ignore[return-value]  # narrowed by the line above


def _array(data: bytes, dtype: np.dtype, shape: Any, order: Any) -> NDArray:
    is_shape = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS and all(map(_is_size, shape))
    if not is_shape or order not in ("C", "F") or math.prod(shape) * dtype.itemsize != len(data):
        raise PickleError("holds a numpy array whose shape is not that of its data")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= sys.maxsize


def _to_dtype(value: object) -> np.dtype:
    """Only plain numbers: the type is made anew from its checked name, never from the pickle's own state."""
    if not isinstance(value, Call) or value.name != _DTYPE or not value.args:
        raise PickleError("holds a numpy array without a type")
    kind, state = value.args[0], value.state
    if not isinstance(kind, str) or kind not in _NUMBER_TYPES:
        named = repr(kind[:20]) if isinstance(kind, str) else "unknown"
        raise PickleError(f"holds a numpy array of type {named}, not of plain numbers")
    if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
        raise PickleError("holds a numpy array of records")
    order = _ORDERS.get(state[1]) if isinstance(state[1], str) else None
    if order is None:
        raise PickleError("holds a numpy array of an unknown byte order")
    return np.dtype(order + kind)


def _to_bytes(value: object) -> bytes:
    """Bytes as they are, or written as text, as protocol 2 and Python 2 do."""
    if isinstance(value, Call) and value.name == _ENCODE and len(value.args) == 2 and value.args[1] == "latin1":
        value = value.args[0]
    if isinstance(value, str):
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError as error:
            raise PickleError("holds text where an array's bytes should be") from error
    if not isinstance(value, bytes):
        raise PickleError("holds a numpy array without data")
    return value
