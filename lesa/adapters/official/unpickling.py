"""A reader of pickled data in which nothing can run.

A pickle is a program for a small stack machine that may name any function and have it called. Here nothing is imported
or called: what ``torch.save`` writes for a tensor becomes a description of it, an instance of somebody's class becomes
its attributes, and any other function ends the reading with its name. The instructions are those of
https://docs.python.org/3/library/pickletools.html, the tensors those of
https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import math
import pickletools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

MAX_BYTES = 1 << 20  # a released checkpoint's is 60 kB; this many take a second
MAX_VALUES = 10_000  # in what `plain` makes: a few bytes of pickle can describe 2^1000 values
MAX_DEPTH = 20
MAX_DIMENSIONS = 8  # of a tensor; a weight has two or three
MAX_ELEMENTS = 1 << 40  # that a tensor would have which has none, since one of its sizes is zero
MAX_INTEGER = 1 << 63  # larger ones have no use, and can be made to collide as keys
MAX_TEXT = 1000  # characters of a key or a path: a path of two times itself doubles with every few bytes


class RefusedError(ValueError):
    """A file asks for what no checkpoint needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """For a message: without control characters, and not longer than it."""
        return ascii(f"{self.module}.{self.name}")[1:-1][:100]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file: elements of storage ``key``, which has ``numel`` elements of ``dtype``."""

    dtype: str
    key: str
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Record:
    """An instance of a class that is not there: its name, and the attributes the file gives it."""

    kind: Name
    fields: Any = None


DTYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}

KNOWN_PACKAGES = sys.stdlib_module_names | {"__builtin__", "copy_reg", "torch", "numpy"}  # two are Python 2's


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Of ``torch._utils._rebuild_tensor_v2``; what follows the stride is about gradients."""
    fits = isinstance(shape, tuple) and isinstance(stride, tuple) and max(len(shape), len(stride)) <= MAX_DIMENSIONS
    numbers = (offset, *shape, *stride) if fits else (None,)
    if not isinstance(storage, StoredTensor) or any(type(n) is not int or n < 0 for n in numbers):
        raise RefusedError("it describes a tensor that is none")
    if len(shape) != len(stride):
        raise RefusedError(f"it describes a tensor of shape {shape} with strides {stride}")
    if 0 in shape and math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise RefusedError(f"it describes a tensor of shape {shape}")
    return StoredTensor(storage.dtype, storage.key, storage.numel, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise RefusedError("it describes a parameter that is no tensor")
    return data


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    """Pairs as a dictionary; whoever asks for it has paid for their number."""
    return {_key(key): value for key, value in pairs}


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise RefusedError("it describes a device that is none")
    return kind if index is None else f"{kind}:{index}"


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise RefusedError("it describes a path that is none")
    if sum(map(len, parts)) > MAX_TEXT:
        raise RefusedError("it describes a path that is longer than any")
    return str(PurePosixPath(*parts))


# What the file may have called, and what stands for the result.
STAND_INS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _mapping,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch", "device"): _device,
    Name("pathlib", "PosixPath"): _path,
    Name("pathlib._local", "PosixPath"): _path,  # Python 3.13
}


def read_pickle(data: bytes) -> Any:
    """The content of a pickle as plain data, :class:`StoredTensor` and :class:`Record`.

    Raises:
        RefusedError: for anything else that it describes, with the name of what it wanted.
        ValueError: if it is damaged.
    """
    if len(data) > MAX_BYTES:
        raise RefusedError(f"its description of the data has {len(data)} bytes, where {MAX_BYTES} are plenty")
    try:
        return _run(data)
    except RefusedError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"damaged: {str(error)[:MAX_TEXT]}") from error


def _run(data: bytes) -> Any:
    """Each instruction does as much as it has bytes, but for calls, which are given what was made once, many times."""
    called = 0  # values that calls were given
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks beneath each open mark
    memo: dict[int, Any] = {}
    instructions: Iterable[tuple[Any, Any, Any]] = pickletools.genops(data)
    for opcode, argument, _ in instructions:
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                if abs(argument) >= MAX_INTEGER and opcode.name != "BINFLOAT":
                    raise RefusedError("it holds a number of more than 64 bits")
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[len(stack) - count :])]
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items, stack = stack, below.pop()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items, stack = stack, below.pop()
                _of(dict, stack[-1]).update(_mapping(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(_of(str, module), _of(str, name)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                called += _size(_of(tuple, arguments))
                if called > len(data):
                    raise RefusedError("its calls are given more values than it has bytes")
                stack.append(_call(function, arguments))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                stack.append(_instance(kind, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "INST":
                raise RefusedError(f"it wants {Name(*argument.split(' ', 1))} called")
            case other:
                raise RefusedError(f"it uses the instruction {other}, which no checkpoint needs")
    raise ValueError("it has no end")


def _size(arguments: tuple[Any, ...]) -> int:
    """How many values a call is given, with those of a list or a tuple among them."""
    return sum(len(value) if isinstance(value, list | tuple) else 1 for value in arguments)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise RefusedError(f"it has a dictionary with a {type(key).__name__} as a key")
    if isinstance(key, str) and len(key) > MAX_TEXT:
        raise RefusedError(f"it has a dictionary with a key of {len(key)} characters")
    return key


def _name(module: str, name: str) -> Any:
    """A name the file may mention: a stand-in's, a kind of storage, a dtype, or a class of somebody's package."""
    named = Name(module, name)
    if named in STAND_INS or (module == "torch" and name in DTYPES):
        return named
    if module == "torch" and name in DTYPES.values():
        return str(named)
    # a class of the authors' is not installed here, so it cannot be known by name; the standard library's can
    if module.partition(".")[0] in KNOWN_PACKAGES:
        raise RefusedError(f"it asks for {named}")
    return named


def _storage(description: Any) -> StoredTensor:
    """A storage as the flat tensor that it is."""
    match description:
        case ("storage", Name("torch", kind), str(key), str(_), int(numel)) if kind in DTYPES and numel >= 0:
            return StoredTensor(DTYPES[kind], key, numel, 0, (numel,), (1,))
    raise RefusedError("it refers to something that is not in the file")


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, Name) or function not in STAND_INS:
        raise RefusedError(f"it wants {_shown(function)} called")
    return STAND_INS[function](*arguments)


def _instance(kind: Any, arguments: Any) -> Record:
    if not isinstance(kind, Name) or kind in STAND_INS or kind.module == "torch" or arguments != ():
        raise RefusedError(f"it wants {_shown(kind)} called")
    return Record(kind)


def _build(target: Any, state: Any) -> None:
    """Attributes: of a record. Those of a state_dict are the versions of its modules, which nobody needs."""
    if isinstance(target, Record) and target.fields is None and isinstance(state, dict | list | tuple):
        target.fields = state
    elif not (isinstance(target, dict) and isinstance(state, dict) and set(state) <= {"_metadata"}):
        kind = target.kind if isinstance(target, Record) else type(target).__name__
        raise RefusedError(f"it wants the attributes of a {kind} changed")


def _shown(value: Any) -> str:
    """A value for a message; of a name alone its text, since a few bytes can describe a list whose text is endless."""
    return str(value) if isinstance(value, Name) else f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """A copy in which records are dictionaries of their attributes, tuples lists, and nothing is shared.

    Raises:
        RefusedError: for what is neither a number nor text nor made of them, or more than a settings file would hold.
    """
    left = MAX_VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise RefusedError(f"its settings have more than {MAX_VALUES} values or lie more than {MAX_DEPTH} deep")
        match value:
            case None | bool() | int() | float() | str():
                return value
            case list() | tuple():
                return [copy(item, depth + 1) for item in value]
            case dict():
                return {key: copy(item, depth + 1) for key, item in value.items()}
            case Record():
                return copy({} if value.fields is None else value.fields, depth + 1)
        raise RefusedError(f"its settings hold {_shown(value)}")

    return copy(value, 0)
