"""The file that ``torch.save`` writes: a zip archive of one pickle and the bytes of every storage.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-save-format. Nothing is unpacked to disk,
and no entry is read that the pickle does not name. The entries lie apart in the file, so what is read of it once is no
more than the file itself, and each storage is read once, however many tensors lie in it.
"""

import io
import math
import struct
import zipfile
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lesa.api.official.unpickling import MAX_BYTES, read_pickle
from lesa.api.official.values import RefusedError, StoredTensor

MAX_DIRECTORY = 1 << 18  # bytes of the list of entries; a released checkpoint's is 20 kB
MAX_NAME = 1000  # characters of an entry's name, which holds that of the file
HEADER = 30  # bytes before the name and the content of an entry
MAX_ELEMENTS = 1 << 40  # of an empty tensor whose other sizes are multiplied; torch computes its strides
# What zipfile raises for damage: its own, of text in names, of versions it does not know, of places beyond the file.
DAMAGE = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError, OverflowError, struct.error)


class _File(io.BufferedReader):
    """A file that is read in pieces of bounded size while zipfile looks for the list of entries.

    zipfile takes for each entry time that grows as the square of what the list holds of it.
    """

    most: int | None = MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > self.most:
            raise RefusedError(f"its list of entries has {size} bytes, at most {self.most} are allowed")
        return super().read(size)


class Archive:
    """An open file of ``torch.save``; a context manager.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another kind of file.
    """

    def __init__(self, path: Path) -> None:
        self._file = _File(io.FileIO(path))
        try:
            self._zip = self._opened(path)
            self._root = _root(self._zip.namelist())
            self._entries = _entries(self._zip, path.stat().st_size)
            self._check_byte_order()
        except BaseException:
            self._file.close()
            raise

    def _opened(self, path: Path) -> zipfile.ZipFile:
        try:
            archive = zipfile.ZipFile(self._file)
        except RefusedError:
            raise
        except DAMAGE as error:
            raise ValueError(f"{_what_it_is(path)} ({error})") from error
        self._file.most = None
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._zip.close()
        self._file.close()

    def _check_byte_order(self) -> None:
        name = f"{self._root}/byteorder"
        if name in self._entries and self._entries[name].file_size < 16 and self._read(name) != b"little":
            raise ValueError("written by a big-endian machine, which this reader does not know")

    def content(self) -> Any:
        """What was saved, with a :class:`StoredTensor` for each tensor."""
        info = self._entries[f"{self._root}/data.pkl"]
        if info.file_size > MAX_BYTES:
            raise RefusedError(
                f"its description of the data has {info.file_size} bytes, at most {MAX_BYTES} are allowed"
            )
        return read_pickle(self._read(f"{self._root}/data.pkl"))

    def tensors(self, stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors themselves, contiguous; no more of them than the file has bytes."""
        for tensor in stored.values():
            _check_bounds(tensor)
        described = sum(math.prod(t.shape) * _dtype(t).itemsize for t in stored.values())
        held = sum(info.file_size for info in self._entries.values())
        if described > held:
            raise RefusedError(f"it describes tensors of {described} bytes and holds {held}")
        by_storage: defaultdict[str, list[str]] = defaultdict(list)
        for name, tensor in stored.items():
            self._check_size(tensor)
            by_storage[tensor.key].append(name)
        made: dict[str, Tensor] = {}
        for key, names in by_storage.items():
            content = self._storage(key)
            made |= {name: _tensor(stored[name], content) for name in names}
        return {name: made[name] for name in stored}

    def _check_size(self, stored: StoredTensor) -> None:
        wanted, name = stored.numel * _dtype(stored).itemsize, self._name(stored.key)
        there = self._entries[name].file_size if name in self._entries else 0
        if there != wanted:
            raise ValueError(f"damaged: a storage should have {wanted} bytes and has {there}")

    def _storage(self, key: str) -> bytearray:
        name = self._name(key)
        return bytearray(self._read(name)) if name in self._entries else bytearray()

    def _name(self, key: str) -> str:
        return f"{self._root}/data/{key}"

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except DAMAGE as error:
            raise ValueError(f"damaged: {error}") from error


def _tensor(stored: StoredTensor, content: bytearray) -> Tensor:
    dtype = _dtype(stored)
    if math.prod(stored.shape) == 0:
        return torch.empty(stored.shape, dtype=dtype)
    flat = torch.frombuffer(content, dtype=dtype)
    # of a dimension of one element no step is ever taken, and its stride may be anything
    stride = [step if n > 1 else 1 for n, step in zip(stored.shape, stored.stride, strict=True)]
    return flat.as_strided(stored.shape, stride, stored.offset).clone(memory_format=torch.contiguous_format)


def _check_bounds(stored: StoredTensor) -> None:
    """Refuse a tensor that reaches beyond its storage, or repeats its elements."""
    if math.prod(max(1, n) for n in stored.shape) > MAX_ELEMENTS and 0 in stored.shape:
        raise RefusedError(f"it describes an empty tensor {list(stored.shape)}")
    elements = math.prod(stored.shape)
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
    if elements > stored.numel or (elements and last >= stored.numel):
        raise RefusedError(f"it describes a tensor {list(stored.shape)} in a storage of {stored.numel} elements")


def _dtype(stored: StoredTensor) -> torch.dtype:
    dtype = getattr(torch, stored.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name: each uncompressed and there once, in a file of ``size`` bytes in which none overlap."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if len(info.filename) > MAX_NAME:
            raise RefusedError(f"it holds an entry whose name is longer than {MAX_NAME} characters")
        if info.filename in entries:
            raise RefusedError(f"it holds {info.filename[:80]!a} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise RefusedError(f"{info.filename[:80]!a} is compressed or encrypted, which torch.save never does")
        entries[info.filename] = info
    free = 0
    for info in sorted(entries.values(), key=lambda info: info.header_offset):
        if info.header_offset < free:
            raise RefusedError(f"its {info.filename[:80]!a} overlaps with another entry")
        free = info.header_offset + HEADER + info.file_size
    if free > size:
        raise ValueError("damaged: its entries are larger than the file")
    return entries


def _root(names: list[str]) -> str:
    """The folder of all entries in the archive."""
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
