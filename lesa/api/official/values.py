"""What a pickle is read as: plain data, and descriptions of tensors, names and instances."""

from dataclasses import dataclass
from typing import Any

MAX_VALUES = 10_000  # in the result of `plain`: a few bytes of pickle can describe 2^1000 values
MAX_DEPTH = 20


class RefusedError(ValueError):
    """A file asks for what no checkpoint needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        """For a message: printable, at most 100 characters."""
        return ascii(f"{self.module}.{self.name}")[1:-1][:100]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in its file: elements of storage ``key``, which has ``numel`` elements of ``dtype``."""

    dtype: str
    key: str
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class UnknownInstance:
    """An instance of an unknown class: the name of the class, and its attributes."""

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


def kind_of(value: Any) -> str:
    """A value for a message: a name, or only the type, since the text of other values has no bound."""
    return str(value) if isinstance(value, Name) else f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """A copy in which records are dictionaries of their attributes, tuples lists, and nothing is shared.

    Raises:
        RefusedError: for other types than numbers and text, and for too many values.
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
            case UnknownInstance():
                return copy({} if value.fields is None else value.fields, depth + 1)
        raise RefusedError(f"its settings hold {kind_of(value)}")

    return copy(value, 0)
