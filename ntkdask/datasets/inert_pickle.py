"""Read a pickle of numbers, text, lists, tuples, dicts and arrays of bytes without calling anything that it names.

`pickle.Unpickler` is no reader of files from strangers, even with a list of allowed names: `dtype.__setstate__` with forged flags
makes NumPy follow pointers of the file's choice, a large memo index takes all memory, a deeply nested key overflows the stack.
The machine here knows the opcodes that such data need, on a Python stack, and refuses every other. Names become `Name`, arrays
`PickledArray`: records, of which `PickledArray.to_uint8` makes an array once shape, type and bytes agree. Called by `cifar_python`.
"""

from __future__ import annotations

import codecs
import io
import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ntkdask.errors import DataError

# a batch of CIFAR has about 5 opcodes an image; each can make an object of some hundred bytes
MAX_OPCODES = 2**20
# a nested tuple is compared and hashed by recursion in C
_MAX_TUPLE_DEPTH = 8
_MAX_LINE = 2**28
_RECONSTRUCT = "numpy.core.multiarray._reconstruct"
_FROM_BUFFER = "numpy.core.numeric._frombuffer"
_ENCODE = "_codecs.encode"
_DTYPE = "numpy.dtype"
_ALLOWED = (_RECONSTRUCT, _FROM_BUFFER, _ENCODE, _DTYPE, "numpy.ndarray")
_OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}
_MARK = object()


class Name(NamedTuple):
    """A name that a pickle asks for, "module.name"; nothing is imported."""

    text: str


class PickledType:
    """A dtype of a pickle: the code that it was made with, such as "u1". Its state, which sets flags and fields, is ignored."""

    def __init__(self, code: str) -> None:
        self.code = code


class PickledArray:
    """An array of a pickle: shape, type, order and bytes as the pickle gives them, unchecked."""

    shape: Any = None
    type: Any = None
    fortran: Any = False
    content: Any = None

    def to_uint8(self) -> np.ndarray | None:
        """The array; None where it is not of bytes, or shape and bytes disagree."""
        shape, content = self.shape, self.content
        if not (isinstance(self.type, PickledType) and self.type.code == "u1" and isinstance(content, bytes)):
            return None
        if not (isinstance(shape, tuple) and all(type(s) is int and s >= 0 for s in shape)):
            return None
        if math.prod(shape) != len(content):
            return None
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if self.fortran else "C")


def loads(content: bytes) -> Any:
    """What a pickle of any protocol holds; byte strings of Python 2 stay bytes.

    DataError for a name or an opcode that such data do not need, and for more opcodes than they need; EOFError, ValueError or another
    error of Python where the pickle is damaged.
    """
    return _Machine(content).run()


class _Machine:
    """The stack, the marks and the memo of one pickle; a method for each group of opcodes."""

    def __init__(self, content: bytes) -> None:
        self._in = io.BytesIO(content)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # by id: the machine keeps every tuple alive until it ends
        self._depths: dict[int, int] = {}
        self._tuples: list[tuple[Any, ...]] = []

    def run(self) -> Any:
        """The object that is on the stack at STOP."""
        for _ in range(MAX_OPCODES):
            name = _OPCODES.get(self._unsigned(1), "unknown")
            if name == "STOP":
                return self._pop()
            if name in _ACTIONS:
                _ACTIONS[name](self)
            elif name in _ARGUMENTS:
                self._stack.append(_ARGUMENTS[name](self))
            else:
                raise DataError(
                    f"its pickle uses the opcode {name}, which CIFAR-10 does not need. Do not trust this file."
                )
        raise DataError(f"its pickle has more than {MAX_OPCODES} opcodes, which CIFAR-10 does not need.")

    # what opcodes read

    def _bytes(self, count: int) -> bytes:
        content = self._in.read(count)
        if len(content) < count:
            raise EOFError("the pickle ends early")
        return content

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little")

    def _signed(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little", signed=True)

    def _line(self) -> bytes:
        line = self._in.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError("the pickle ends early")
        return line[:-1]

    def _integer_line(self) -> int | bool:
        line = self._line().removesuffix(b"L")
        return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)

    def _quoted_line(self) -> bytes:
        line = self._line().strip()
        if len(line) < 2 or line[:1] not in (b'"', b"'") or line[-1:] != line[:1]:
            raise ValueError("a string without quotes")
        return codecs.escape_decode(line[1:-1])[0]  # as pickle itself reads them

    # what opcodes do

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is needed")
        return value

    def _pop_to_mark(self) -> list[Any]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            if start == 0:
                raise ValueError("no mark")
            start -= 1
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values

    def _push_tuple(self, values: list[Any]) -> None:
        depth = 1 + max((self._depths.get(id(v), 0) for v in values if isinstance(v, tuple)), default=0)
        if depth > _MAX_TUPLE_DEPTH:
            raise DataError(f"its pickle nests more than {_MAX_TUPLE_DEPTH} tuples, which CIFAR-10 does not need.")
        made = tuple(values)
        self._tuples.append(made)
        self._depths[id(made)] = depth
        self._stack.append(made)

    def _take(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _remember(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._stack.append(value)

    def _extend(self, values: list[Any]) -> None:
        _require(self._stack[-1], list).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        table = _require(self._stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            table[_require(key, (str, bytes))] = value

    def _name(self, module: Any, name: Any) -> Name:
        full = f"{_require(module, str)}.{_require(name, str)}"
        # NumPy 2 moved its core
        text = full.replace("numpy._core.", "numpy.core.")
        if text not in _ALLOWED:
            raise DataError(f"its pickle asks for {full:.200}, which CIFAR-10 does not need. Do not trust this file.")
        return Name(text)

    def _call(self) -> None:
        """REDUCE: a record of what the named function would make."""
        function, arguments = self._take(2)
        arguments = _require(arguments, tuple)
        kind = function.text if isinstance(function, Name) else ""
        made: Any
        if kind == _RECONSTRUCT:
            made = PickledArray()
        elif kind == _FROM_BUFFER:
            made = PickledArray()
            made.content, made.type, made.shape, order = arguments
            made.content, made.fortran = bytes(_require(made.content, (bytes, bytearray))), order == "F"
        elif kind == _DTYPE:
            code = arguments[0]
            made = PickledType(code.decode("ascii") if isinstance(code, bytes) else _require(code, str))
        elif kind == _ENCODE and len(arguments) == 2 and arguments[1] == "latin1":
            made = _require(arguments[0], str).encode("latin1")
        else:
            raise DataError(f"its pickle calls {kind or type(function).__name__}, which CIFAR-10 does not need.")
        self._stack.append(made)

    def _set_state(self) -> None:
        """BUILD: an array records its shape, type, order and bytes; a dtype nothing."""
        state = _require(self._pop(), tuple)
        value = _require(self._stack[-1], (PickledArray, PickledType))
        if isinstance(value, PickledArray):
            _, value.shape, value.type, value.fortran, value.content = state


def _require(value: Any, kind: Any) -> Any:
    """`value` itself; ValueError where it is not of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where the pickle needs another object")
    return value


_ARGUMENTS: dict[str, Callable[[_Machine], Any]] = {
    "NONE": lambda m: None,
    "NEWTRUE": lambda m: True,
    "NEWFALSE": lambda m: False,
    "INT": _Machine._integer_line,
    "LONG": _Machine._integer_line,
    "BININT": lambda m: m._signed(4),
    "BININT1": lambda m: m._unsigned(1),
    "BININT2": lambda m: m._unsigned(2),
    "LONG1": lambda m: m._signed(m._unsigned(1)),
    "STRING": _Machine._quoted_line,
    "BINSTRING": lambda m: m._bytes(m._unsigned(4)),
    "SHORT_BINSTRING": lambda m: m._bytes(m._unsigned(1)),
    "BINBYTES": lambda m: m._bytes(m._unsigned(4)),
    "SHORT_BINBYTES": lambda m: m._bytes(m._unsigned(1)),
    "BINBYTES8": lambda m: m._bytes(m._unsigned(8)),
    "BYTEARRAY8": lambda m: bytearray(m._bytes(m._unsigned(8))),
    "UNICODE": lambda m: m._line().decode("raw-unicode-escape"),
    "BINUNICODE": lambda m: m._bytes(m._unsigned(4)).decode("utf-8", "surrogatepass"),
    "SHORT_BINUNICODE": lambda m: m._bytes(m._unsigned(1)).decode("utf-8", "surrogatepass"),
    "BINUNICODE8": lambda m: m._bytes(m._unsigned(8)).decode("utf-8", "surrogatepass"),
    "EMPTY_LIST": lambda m: [],
    "EMPTY_DICT": lambda m: {},
    "LIST": lambda m: m._pop_to_mark(),
    "MARK": lambda m: _MARK,
    "GET": lambda m: m._memo[int(m._line())],
    "BINGET": lambda m: m._memo[m._unsigned(1)],
    "LONG_BINGET": lambda m: m._memo[m._unsigned(4)],
    "GLOBAL": lambda m: m._name(m._line().decode(), m._line().decode()),
    "STACK_GLOBAL": lambda m: m._name(*m._take(2)),
}
"""Opcodes that put a value on the stack."""


def _dict(machine: _Machine) -> None:
    values = machine._pop_to_mark()
    machine._stack.append({})
    machine._set_items(values)


_ACTIONS: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda m: m._unsigned(1),
    "FRAME": lambda m: m._unsigned(8),
    "POP": lambda m: m._stack.pop(),
    "POP_MARK": lambda m: m._pop_to_mark(),
    "PUT": lambda m: m._remember(int(m._line())),
    "BINPUT": lambda m: m._remember(m._unsigned(1)),
    "LONG_BINPUT": lambda m: m._remember(m._unsigned(4)),
    "MEMOIZE": lambda m: m._remember(len(m._memo)),
    "EMPTY_TUPLE": lambda m: m._push_tuple([]),
    "TUPLE": lambda m: m._push_tuple(m._pop_to_mark()),
    "TUPLE1": lambda m: m._push_tuple(m._take(1)),
    "TUPLE2": lambda m: m._push_tuple(m._take(2)),
    "TUPLE3": lambda m: m._push_tuple(m._take(3)),
    "APPEND": lambda m: m._extend(m._take(1)),
    "APPENDS": lambda m: m._extend(m._pop_to_mark()),
    "DICT": _dict,
    "SETITEM": lambda m: m._set_items(m._take(2)),
    "SETITEMS": lambda m: m._set_items(m._pop_to_mark()),
    "REDUCE": _Machine._call,
    "BUILD": _Machine._set_state,
}
"""Opcodes that change the stack or the memo."""
