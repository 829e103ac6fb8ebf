"""Headings and formats of result tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# heading and format of each value, in the order of the columns; a column is shown if any row has it
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "plan": ("full steps", str),
    "method": ("method", str),
    "full_steps": ("count", str),
    "speedup_ideal": ("ideal", "{:.2f}x".format),
    "speedup_wall": ("wall clock", "{:.2f}x".format),
    "speedup_wall_batch_1": ("1 image", "{:.2f}x".format),
    "psnr": ("PSNR", "{:.2f} dB".format),
    "ssim": ("SSIM", "{:.4f}".format),
    "lpips": ("LPIPS", "{:.4f}".format),
    "clip_score": ("CLIP score", "{:.2f}".format),
    "classifier_agreement": ("classifier", "{:.1%}".format),
    "kept_bytes": ("kept", lambda size: f"{size / 2**20:.1f} MiB"),
    "peak_bytes": ("peak", lambda size: f"{size / 2**30:.2f} GiB"),
}
LEFT = 2  # columns of text


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The headings of the values that any row has, and the formatted rows."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    texts = [["" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in shown] for row in rows]
    return [COLUMNS[key][0] for key in shown], texts


def console_table(rows: Sequence[Mapping[str, Any]], title: str) -> "Table":
    """The rows as a table for a terminal, grouped by plan."""
    from rich.table import Table

    headings, texts = cells(rows)
    result = Table(title=title)
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index < LEFT else "right", overflow="fold")
    for number, text in enumerate(texts):
        if number > 0 and text[0] != texts[number - 1][0]:
            result.add_section()
        result.add_row(*text)
    return result
