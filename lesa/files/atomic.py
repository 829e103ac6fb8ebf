"""Files that are there whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to, which takes its place at the end.

    The old file is never written to: who has it mapped into memory keeps what was there. On an error the new one is
    removed. Two processes that write the same path do not share a file.

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
    """One process at a time may be inside for this path; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
