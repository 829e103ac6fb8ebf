"""Atomic files: a reader sees the old file or the new one, never a part."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to; it replaces the old one at the end, or is removed after an error.

    The old file is never written to, so memory maps of it stay valid. Two processes never write to the same file.

    Raises:
        OSError: that names the path, if it cannot be written: no room, no permission, or a folder that is a file.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise type(error)(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises as :func:`replaced`."""
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock between processes for this path; others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
