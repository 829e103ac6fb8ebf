"""A reader of pickles that executes nothing.

A pickle is a program for a small stack machine that can call any function. Here nothing is imported or called: a tensor
of ``torch.save`` becomes a description of it, an instance of a class becomes its attributes, and any other function is
an error with its name. Instructions: https://docs.python.org/3/library/pickletools.html, tensors:
https://docs.pytorch.org/docs/stable/notes/serialization.html.

The cost is bounded by the size of the pickle. Most instructions do a fixed amount of work. Those that build a value
from others (a path, a mapping, a tensor's shape) could use a large value again and again, so they are charged, before
they run, with the characters and items that they copy; the budget is the size of the pickle. Integers have 64 bits, and
what is compared or hashed is short.
"""

import io
import pickletools
import sys
from collections.abc import Iterator
from typing import Any

from lesa.api.official.allowed import ARGUMENTS, MAX_NAME, STAND_INS, check_key, mapping
from lesa.api.official.values import DTYPES, Name, RefusedError, StoredTensor, UnknownInstance, kind_of

MAX_BYTES = 1 << 18  # a released checkpoint's is 60 kB; this many take half a second
SPARE = 1000  # what the smallest pickle may copy


# The instructions of torch.save, and INST, whose argument names a function. Others are refused before their arguments
# are decoded, which can take long.
INSTRUCTIONS = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "EMPTY_LIST",
        "EMPTY_DICT",
        "EMPTY_TUPLE",
        "MARK",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "BINPERSID",
        "REDUCE",
        "NEWOBJ",
        "BUILD",
        "INST",
    ]
)
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}

KNOWN_PACKAGES = sys.stdlib_module_names | {"__builtin__", "copy_reg", "torch", "numpy"}  # two are of Python 2


def read_pickle(data: bytes) -> Any:
    """The content of a pickle as plain data, :class:`StoredTensor` and :class:`UnknownInstance`.

    Raises:
        RefusedError: for anything else; the message names it.
        ValueError: if it is damaged.
    """
    if len(data) > MAX_BYTES:
        raise RefusedError(f"its description of the data has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        return _run(data)
    except RefusedError:
        raise
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from error
    except LookupError as error:  # of the stack, the marks and the memo
        raise ValueError("damaged: an instruction finds no value") from error


class _Budget:
    """The characters and items that a pickle may still copy; as many as it has bytes."""

    def __init__(self, size: int) -> None:
        self._left = size + SPARE

    def charge(self, *values: Any) -> None:
        """Charge the cost of copying these values, one level deep."""
        self._spend(len(values))
        self._spend(sum(len(value) for value in values if isinstance(value, str | list | tuple | dict)))

    def _spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise RefusedError("it describes more than it has bytes for")


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """Each instruction by name, with its argument.

    Raises:
        RefusedError: for an instruction that is not in ``INSTRUCTIONS``.
        ValueError: if an argument is incomplete or no text.
    """
    file = io.BytesIO(data)
    while code := file.read(1):
        opcode = OPCODES.get(code)
        if opcode is None or opcode.name not in INSTRUCTIONS:
            name = f"{code!r}" if opcode is None else opcode.name
            raise RefusedError(f"it uses the instruction {name}, which no checkpoint needs")
        if opcode.name in ("GLOBAL", "INST"):
            yield opcode.name, Name(_line(file), _line(file))
        else:
            yield opcode.name, None if opcode.arg is None else opcode.arg.reader(file)


def _line(file: io.BytesIO) -> str:
    """A line of text; pickletools would interpret backslashes as escapes."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a name has no end")
    return line[:-1].decode()


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks beneath each open mark
    memo: list[Any] = []  # a pickler numbers what it keeps from zero on
    budget = _Budget(len(data))
    for instruction, argument in _instructions(data):
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "LONG1":
                stack.append(_int64(argument))
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
                count = int(instruction[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items, stack = stack, below.pop()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[check_key(key)] = value
            case "SETITEMS":
                items, stack = stack, below.pop()
                _of(dict, stack[-1]).update(mapping(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                if argument != len(memo):
                    raise ValueError("it keeps a value under a number that is not the next")
                memo.append(stack[-1])
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument.module, argument.name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(_of(str, module), _of(str, name)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, _of(tuple, arguments), budget))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                stack.append(_instance(kind, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "INST":
                raise RefusedError(f"it asks to call {argument}")
    raise ValueError("it has no end")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _int64(number: int) -> int:
    if not -(1 << 63) <= number < 1 << 63:
        raise RefusedError("it has a number of more than 64 bits")
    return number


def _name(module: str, name: str) -> Any:
    """A name that the file may mention: an allowed function, a kind of storage, a dtype, or a class of a package."""
    if len(module) > MAX_NAME or len(name) > MAX_NAME:
        raise RefusedError(f"it asks for a class whose name is longer than {MAX_NAME} characters")
    named = Name(module, name)
    if named in STAND_INS or (module == "torch" and name in DTYPES):
        return named
    if module == "torch" and name in DTYPES.values():
        return str(named)
    # classes of the authors' package are unknown here; those of the standard library are refused by name
    if module.partition(".")[0] in KNOWN_PACKAGES:
        raise RefusedError(f"it asks for {named}")
    return named


def _storage(description: Any) -> StoredTensor:
    """A storage as a flat tensor."""
    match description:
        case ("storage", Name("torch", kind), str(key), str(_), int(numel)) if (
            kind in DTYPES and numel >= 0 and len(key) <= MAX_NAME
        ):
            return StoredTensor(DTYPES[kind], key, numel, 0, (numel,), (1,))
    raise RefusedError("it refers to something that is not in the file")


def _call(function: Any, arguments: tuple[Any, ...], budget: _Budget) -> Any:
    if not isinstance(function, Name) or function not in STAND_INS:
        raise RefusedError(f"it asks to call {kind_of(function)}")
    least, most = ARGUMENTS[STAND_INS[function]]
    if not least <= len(arguments) <= most:
        raise RefusedError(f"it asks to call {function} with {len(arguments)} values")
    budget.charge(*arguments)
    return STAND_INS[function](*arguments)


def _instance(kind: Any, arguments: Any) -> UnknownInstance:
    if not isinstance(kind, Name) or kind in STAND_INS or kind.module == "torch" or arguments != ():
        raise RefusedError(f"it asks to call {kind_of(kind)}")
    return UnknownInstance(kind)


def _build(target: Any, state: Any) -> None:
    """Set the attributes of an instance. The metadata of a state_dict is ignored."""
    if isinstance(target, UnknownInstance) and target.fields is None and isinstance(state, dict | list | tuple):
        target.fields = state
    elif not (isinstance(target, dict) and isinstance(state, dict) and state.keys() <= {"_metadata"}):
        kind = target.kind if isinstance(target, UnknownInstance) else type(target).__name__
        raise RefusedError(f"it asks to change the attributes of a {kind}")
