"""The pictures of an evaluation: quality by the number of full steps, and which steps are full."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, PALE = "#1f4e79", "#d6e0ea"
COLOURS = ("#9a9a9a", "#e0a030", "#c05020", INK, "#3a8f5c", "#7a3f9d", "#b03060", "#507080")


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Both pictures of an evaluation, ``quality.png`` and ``plans.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_quality(folder / "quality.png", rows)
    steps = max(row["full_steps"] for row in rows)
    draw_strips(folder / "plans.png", {row["plan"]: (row["full"], steps) for row in rows[1:]})


def draw_quality(path: Path, rows: Sequence[Mapping[str, Any]], metric: str = "psnr", unit: str = "PSNR, dB") -> None:
    """A metric by the number of full steps, with a line for each method on each kind of plan."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.get(metric) is not None and row["speedup_ideal"] > 1:
            lines[row["method"], kind_of(row["plan"])].append((row["full_steps"], row[metric]))
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    colours = dict(zip(dict.fromkeys(name for name, _ in lines), itertools.cycle(COLOURS), strict=False))
    styles = dict(zip(dict.fromkeys(kind for _, kind in lines), itertools.cycle(("-o", "--s", ":^")), strict=False))
    for (name, kind), points in lines.items():
        steps, values = zip(*sorted(points), strict=True)
        axis.plot(steps, values, styles[kind], color=colours[name], markersize=4, label=f"{name}, {kind}")
    axis.set(xlabel="full steps", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    _save(figure, path)


def draw_strips(path: Path, plans: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """Which steps of each plan are full, from (full steps, number of steps) by name."""
    figure, axis = plt.subplots(figsize=(7.5, 0.5 + 0.3 * len(plans)), layout="constrained")
    strips(axis, plans)
    axis.set_xlabel("denoising step")
    _save(figure, path)


def strips(axis: Axes, plans: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """One row of marks for each plan, dark where a step is full."""
    for y, (full, steps) in enumerate(plans.values()):
        colours = [INK if step in full else PALE for step in range(steps)]
        axis.bar(range(steps), 0.7, bottom=y - 0.35, width=0.86, color=colours)
    labels = [f"{name}: {len(full)} full" for name, (full, _) in plans.items()]
    axis.set_yticks(range(len(plans)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("full steps (dark) and predicted steps (pale)", fontsize=9, loc="left")


def kind_of(plan: str) -> str:
    """The first word of a plan's name, which plans of different sizes share: ``"paper"`` of ``"paper N=7"``."""
    return plan.replace(",", " ").split()[0]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
