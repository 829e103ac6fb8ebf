"""The file that ``torch.save`` writes: a zip archive of one pickle and the bytes of every storage.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-save-format. Nothing is unpacked to disk,
and no entry is read that the pickle does not name.
"""

import math
import struct
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lesa.adapters.official.unpickling import MAX_BYTES, RefusedError, StoredTensor, read_pickle

# What zipfile has for a damaged directory or entry.
DAMAGED = (
    zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError, LookupError, OverflowError, struct.error,
)  # fmt: skip
SHOWN = 300  # characters of a message that come from a file


class Archive:
    """An open file of ``torch.save``; a context manager.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another kind of file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise ValueError(f"{_what_it_is(path)} ({str(error)[:SHOWN]})") from error
        self._storages: dict[str, Tensor] = {}
        try:
            self._root = _root(self._zip.namelist())
            self._entries = _entries(self._zip, path.stat().st_size)
            self._check_byte_order()
        except ValueError:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._zip.close()

    def _check_byte_order(self) -> None:
        name = f"{self._root}/byteorder"
        if name in self._entries and self._entries[name].file_size < 16 and self._read(name) != b"little":
            raise ValueError("written by a big-endian machine, which this reader does not know")

    def content(self) -> Any:
        """What was saved, with a :class:`StoredTensor` for each tensor."""
        info = self._entries[f"{self._root}/data.pkl"]
        if info.file_size > MAX_BYTES:
            raise RefusedError(f"its description of the data has {info.file_size} bytes, where {MAX_BYTES} are plenty")
        return read_pickle(self._read(f"{self._root}/data.pkl"))

    def tensors(self, stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors themselves, contiguous; no more of them than the file has bytes."""
        for tensor in stored.values():
            _check_bounds(tensor)
        described = sum(math.prod(t.shape) * _dtype(t).itemsize for t in stored.values())
        held = sum(info.file_size for info in self._entries.values())
        if described > held:
            raise RefusedError(f"it describes tensors of {described} bytes and holds {held}")
        return {name: self._tensor(tensor) for name, tensor in stored.items()}

    def _tensor(self, stored: StoredTensor) -> Tensor:
        name, dtype = f"{self._root}/data/{stored.key}", _dtype(stored)
        wanted = stored.numel * dtype.itemsize
        there = self._entries[name].file_size if name in self._entries else 0
        if there != wanted:
            raise ValueError(f"damaged: a storage should have {wanted} bytes and has {there}")
        if math.prod(stored.shape) == 0:
            return torch.empty(stored.shape, dtype=dtype)
        if name not in self._storages:  # once, however many tensors lie in it
            self._storages[name] = torch.frombuffer(bytearray(self._read(name)), dtype=torch.uint8)
        flat = self._storages[name].view(dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).clone(memory_format=torch.contiguous_format)

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except DAMAGED as error:
            raise ValueError(f"damaged: {str(error)[:SHOWN]}") from error


def _check_bounds(stored: StoredTensor) -> None:
    """Refuse a tensor that reaches beyond its storage, or repeats its elements."""
    elements = math.prod(stored.shape)
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
    if elements > stored.numel or (elements and last >= stored.numel):
        raise RefusedError(f"it describes a tensor {list(stored.shape)} in a storage of {stored.numel} elements")


def _dtype(stored: StoredTensor) -> torch.dtype:
    dtype = getattr(torch, stored.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """By name, each in a place of its own in a file of this size."""
    entries: dict[str, zipfile.ZipInfo] = {}
    free = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < free or info.header_offset + info.compress_size > size:
            raise RefusedError(f"its {info.filename[:80]!a} lies where something else does")
        free = info.header_offset + info.compress_size
        if info.filename in entries:
            raise RefusedError(f"it holds {info.filename[:80]!a} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise RefusedError(f"{info.filename[:80]!a} is compressed or encrypted, which torch.save never does")
        entries[info.filename] = info
    return entries


def _root(names: list[str]) -> str:
    """The folder within the archive that everything lies in."""
    roots = {name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")}
    if len(roots) != 1:
        raise ValueError("a zip archive, but not one of torch.save: it should hold one data.pkl")
    root = roots.pop()
    if f"{root}/constants.pkl" in names:
        raise ValueError("a TorchScript program, not a checkpoint")
    return root


def _what_it_is(path: Path) -> str:
    """In words, for a file that is no zip archive."""
    with path.open("rb") as file:
        start = file.read(16)
    if start[:1] == b"\x80":
        return (
            "a bare pickle, the format of torch.save before 1.6, which cannot be told from a program; open it where "
            "you trust it and torch.save it again"
        )
    if start[8:9] == b"{":
        return "a safetensors file; lesa.LesaPredictor.from_pretrained reads those, with their folder"
    return "not a file of torch.save, or one that was cut short"
