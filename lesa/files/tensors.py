"""Tensors and a description of them in one safetensors file, whose header says what kind of file it is.

Format: https://huggingface.co/docs/safetensors. The description is JSON under the key ``description``; ``kind`` and
``version`` stand beside it. Files that were written before there were versions have neither.
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
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # those that everything can be done with
SHOWN = 300  # characters of a message that come from a file


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        path: of the file.
        metadata: the header's strings; of a file with a version, ``description`` is what counts.
        description: the JSON that was written with it.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, str]
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
        description: anything that JSON can tell.
        kind: that :func:`read_tensors` asks for.
        more: strings of the header that other programs look for.
        stale: a file about the one that is there, which is removed once the new one is whole and before it takes its
            place.

    Raises:
        OSError: that names the path, if it cannot be written.
    """
    header = {"kind": kind, "version": str(VERSION), "description": json.dumps(description), **(more or {})}
    with replaced(path) as unfinished:
        try:
            save_file(_apart(tensors), str(unfinished), header)
        except SafetensorError as error:  # how it says that the disk is full
            raise OSError(None, str(error)) from error
        if stale is not None:
            stale.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, none in the memory of another, which the format does not know."""
    apart: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    return apart


def read_tensors(path: Path, *, kind: str, advice: str = "", mapped: bool = False) -> TensorFile:
    """Read a file of some kind. Its tensors are as large as the file says, which is checked, and no larger than it is.

    Args:
        path: of the file.
        kind: what it has to be; a file without a kind is of the time before there were any.
        advice: what to do if it is damaged.
        mapped: leave the tensors in the file, for those that do not fit into memory; otherwise they are copied, so
            that whatever becomes of the file changes nothing.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, of another kind or of a later version; it names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            _check_header(metadata, kind)
            description = json.loads(metadata.get("description", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError, RuntimeError, OSError) as error:
        raise ValueError(damaged(path, kind, error, advice)) from error
    tensors = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    return TensorFile(path, metadata, description, tensors)


def damaged(path: Path, kind: str, error: Exception | str, advice: str = "") -> str:
    """The message for a file that cannot be used."""
    return f"{path} is not a complete {kind} file: {str(error)[:SHOWN]}{f'; {advice}' if advice else ''}"


def _check_header(metadata: Mapping[str, str], kind: str) -> None:
    if "kind" in metadata and metadata["kind"] != kind:
        raise ValueError(f"it is a {metadata['kind'][:SHOWN]} file")
    if "version" in metadata and metadata["version"] != str(VERSION):
        raise ValueError(
            f"its format has version {metadata['version'][:20]}, this library knows {VERSION}; install a newer lesa"
        )


def check_tensor(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> Tensor:
    """The tensor of a name, if it is there and has this shape (None: any length), one of the dtypes, and is finite.

    Raises:
        ValueError: if not.
    """
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
