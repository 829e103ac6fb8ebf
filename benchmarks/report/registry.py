"""The parts of documents and the pictures that are written from committed results.

A part is the text between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a document. A module here registers it:

    @part("docs/kan.md", "kan layers", "kan_layers.json", command="python -m benchmarks.kan_layers")
    def kan_layers(rows: Any) -> str:
        return table(["layer", "time"], [[row["layer"], f"{row['ms']:.2f} ms"] for row in rows])

The registry appends the machine and the command. For a missing result it writes that it is not measured yet.
A result is JSON: a list of rows with an ``environment`` each (``lesa.reports.environment``), or one object with it.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """The text between the markers ``name`` of ``document``."""

    document: str
    name: str
    result: str | None
    command: str | None
    write: Callable[[Any], str]

    def text(self) -> str:
        """The text, without the markers."""
        if self.result is None:
            return self.write(None)
        measured = load(self.result)
        if measured is None:
            how = f": `{self.command}` writes `benchmarks/results/{self.result}`" if self.command else ""
            return f"Not measured yet{how}."
        text = self.write(measured)
        return text if self.command is None else f"{text}\n\n{source(measured, self.command)}"


@dataclass(frozen=True)
class Picture:
    """An SVG file drawn from a result."""

    path: str
    result: str
    draw: Callable[[Any], "Figure"]


PARTS: dict[tuple[str, str], Part] = {}
PICTURES: dict[str, Picture] = {}


def part(
    document: str, name: str, result: str | None, *, command: str | None
) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register the function that writes a part from the content of ``benchmarks/results/RESULT``.

    Args:
        document: path of a Markdown file in the repository.
        name: the name in the markers.
        result: file name; None: the part is computed from the code alone.
        command: the command that makes the result, without ``--out``; None: another part of the document names it.
    """

    def register(write: Callable[[Any], str]) -> Callable[[Any], str]:
        if (document, name) in PARTS:
            raise ValueError(f"{document} has a part {name!r} already")
        PARTS[document, name] = Part(document, name, result, command, write)
        return write

    return register


def picture(path: str, result: str) -> Callable[[Callable[[Any], "Figure"]], Callable[[Any], "Figure"]]:
    """Register the function that draws the SVG file at ``path`` from ``benchmarks/results/RESULT``."""

    def register(draw: Callable[[Any], "Figure"]) -> Callable[[Any], "Figure"]:
        if path in PICTURES:
            raise ValueError(f"{path} is drawn by another function already")
        PICTURES[path] = Picture(path, result, draw)
        return draw

    return register


def find_parts() -> None:
    """Import every module of this package."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "__main__":
            importlib.import_module(f"{__package__}.{module.name}")


def load(result: str) -> Any:
    """The content of ``benchmarks/results/RESULT``, or None if there is no such file."""
    path = RESULTS / result
    return json.loads(path.read_text()) if path.exists() else None


def environment_of(measured: Any) -> dict[str, Any]:
    """The machine and versions of a result."""
    environment: dict[str, Any] = (measured if isinstance(measured, dict) else measured[0])["environment"]
    return environment


def source(measured: Any, command: str) -> str:
    """The line that names the machine, the versions and the command of a result."""
    environment = environment_of(measured)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    threads = "thread" if environment["threads"] == 1 else "threads"
    return (
        f"{environment['threads']} {threads} of {environment['device']}; {versions}; commit {environment['commit']}. "
        f"Measured by `{command}`."
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are aligned left, the others right."""
    marks = ["---" if column < left else "--:" for column in range(len(headings))]
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join(marks)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def documents() -> list[str]:
    """The documents that have parts."""
    return sorted({document for document, _ in PARTS})


def rendered(document: str, text: str) -> str:
    """The text of a document with all its parts written again.

    Raises:
        ValueError: if a part does not have exactly one place in the text.
    """
    for entry in PARTS.values():
        if entry.document != document:
            continue
        pattern = re.compile(rf"(<!-- {re.escape(entry.name)} -->\n).*?(<!-- end of {re.escape(entry.name)} -->)", re.S)
        body = entry.text()
        text, places = pattern.subn(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)  # type: ignore[misc]
        if places != 1:
            raise ValueError(f"{document} has {places} places for {entry.name!r}, not one")
    return text
