"""Tensors with a JSON description in a safetensors file, whose header has the kind and the version of the file.

Format: https://huggingface.co/docs/safetensors. The description is JSON under the key ``description``; ``kind`` and
``version`` stand beside it. A file of before there were versions is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.files.atomic import replaced

VERSION = 1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHOWN = 300  # characters of a message that come from a file


@dataclass(frozen=True)
class TensorFile:
    """The content of a file.

    Attributes:
        path: of the file.
        description: the JSON that was written with it.
        tensors: by name.
    """

    path: Path
    description: Any
    tensors: dict[str, Tensor]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    description: Any = None,
    *,
    kind: str,
    more: Mapping[str, str] | None = None,
    stale: Path | None = None,
) -> None:
    """Write a file of some kind.

    Args:
        path: of the file.
        tensors: by name.
        description: anything that JSON can hold.
        kind: of the file, which :func:`read_tensors` checks.
        more: further strings of the header, for other programs.
        stale: a file that describes the old one; it is removed just before the new one replaces that.

    Raises:
        OSError: that names the path, if it cannot be written.
    """
    header = {"kind": kind, "version": str(VERSION), "description": json.dumps(description), **(more or {})}
    with replaced(path) as unfinished:
        try:
            save_file(_apart(tensors), str(unfinished), header)
        except SafetensorError as error:  # such as a full disk
            raise OSError(None, str(error)) from error
        if stale is not None:
            stale.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and with separate memory, since the format has no shared tensors."""
    apart: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    return apart


def read_tensors(path: Path, *, kind: str, advice: str = "", mapped: bool = False) -> TensorFile:
    """Read a file of some kind; its sizes are checked before memory is allocated.

    Args:
        path: of the file.
        kind: what it has to be.
        advice: what to do if it is damaged.
        mapped: map the tensors into memory, for files that do not fit; otherwise they are copied.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, of another kind or of another version; it names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            _check_header(header, kind)
            description = json.loads(header["description"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError, RuntimeError, OSError) as error:
        raise ValueError(damaged(path, kind, error, advice)) from error
    tensors = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    return TensorFile(path, description, tensors)


def damaged(path: Path, kind: str, error: Exception | str, advice: str = "") -> str:
    """The message for a file that cannot be used."""
    return f"{path} is not a complete {kind} file: {str(error)[:SHOWN]}{f'; {advice}' if advice else ''}"


def _check_header(header: Mapping[str, str], kind: str) -> None:
    if not {"kind", "description"} <= header.keys():
        check_version(None, VERSION)
    if header["kind"] != kind:
        raise ValueError(f"it is a {header['kind'][:SHOWN]} file")
    check_version(header.get("version"), VERSION)


def check_version(found: Any, known: int) -> None:
    """Raise a ValueError if a file has no version, None, or another one than this library knows."""
    if found is None:
        raise ValueError("it has no version: this library did not write it, or one before versions did")
    if str(found) != str(known):
        raise ValueError(f"its format has version {str(found)[:20]}, this library knows {known}; install a newer lesa")


def check_tensor(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> Tensor:
    """A tensor by name, if it exists, has this shape (None: any length) and dtype, and is finite; else a ValueError."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"it has no {name[:SHOWN]}")
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name[:SHOWN]} is {tensor.dtype} {list(tensor.shape)}, not {kinds} [{wanted}]")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name[:SHOWN]} holds NaN or infinity")
    return tensor
