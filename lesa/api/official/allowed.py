"""The functions that a pickle of a checkpoint may call, each replaced by one of ours that makes a description."""

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

from lesa.api.official.values import Name, RefusedError, StoredTensor

MAX_NAME = 256  # characters of a key, a storage or a class
MAX_KEY = 1 << 16  # integers as keys count parameters; larger ones can be chosen to collide in a dictionary
MAX_DIMS = 8


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Of ``torch._utils._rebuild_tensor_v2``; what follows the stride is about gradients."""
    if type(shape) is not tuple or type(stride) is not tuple or not isinstance(storage, StoredTensor):
        raise RefusedError("what it describes as a tensor is none")
    dims = max(len(shape), len(stride))
    if dims > MAX_DIMS:
        raise RefusedError(f"it describes a tensor of {dims} dimensions, at most {MAX_DIMS} are allowed")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
        raise RefusedError("what it describes as a tensor is none")
    if len(shape) != len(stride):
        raise RefusedError(f"it describes a tensor of shape {shape} with strides {stride}")
    return StoredTensor(storage.dtype, storage.key, storage.numel, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise RefusedError("what it describes as a parameter is no tensor")
    return data


def _ordered(pairs: Any = ()) -> dict[str | int, Any]:
    """Of ``collections.OrderedDict``."""
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise RefusedError("what it describes as a mapping is none")
    return mapping(pairs)


def mapping(pairs: Iterable[Any]) -> dict[str | int, Any]:
    """A dictionary of pairs whose keys are checked."""
    return {check_key(key): value for key, value in pairs}


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise RefusedError("what it describes as a device is none")
    return kind if index is None else f"{kind}:{index}"


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise RefusedError("what it describes as a path is none")
    return str(PurePosixPath(*parts))


# The function that the file calls, and ours in its place.
STAND_INS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _ordered,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch", "device"): _device,
    Name("pathlib", "PosixPath"): _path,
    Name("pathlib._local", "PosixPath"): _path,  # Python 3.13
}
# The least and the largest number of arguments of each.
ARGUMENTS: dict[Callable[..., Any], tuple[int, int]] = {
    _ordered: (0, 1),
    _tensor: (4, 8),
    _parameter: (1, 4),
    _device: (1, 2),
    _path: (0, 100),
}


def check_key(key: Any) -> str | int:
    """A key of a dictionary, if it is short text or a small number."""
    if type(key) is str and len(key) <= MAX_NAME:
        return key
    if type(key) is int and 0 <= key < MAX_KEY:
        return key
    if type(key) in (str, int):
        raise RefusedError(
            f"it has a dictionary with a key that is not below {MAX_KEY}, or longer than {MAX_NAME} characters"
        )
    raise RefusedError(f"it has a dictionary with a {type(key).__name__} as a key")
