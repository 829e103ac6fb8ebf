"""The pictures of an evaluation: quality by full steps, which steps are full, and the similarity of features."""

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
from torch import Tensor

from lesa.calibration.calibration import Calibration
from lesa.statistics.gram import GramMatrix

INK, PALE = "#1f4e79", "#d6e0ea"
COLOURS = ("#9a9a9a", "#e0a030", "#c05020", INK, "#3a8f5c", "#7a3f9d", "#b03060", "#507080")


def draw(folder: Path, rows: Sequence[Mapping[str, Any]], calibration: Calibration | None = None) -> None:
    """All pictures of an evaluation: ``quality.png``, ``plans.png`` and for each stream ``similarity-*.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_quality(folder / "quality.png", rows)
    steps = max(row["full_steps"] for row in rows)
    draw_strips(folder / "plans.png", {row["plan"]: (row["full"], steps) for row in rows[1:]})
    if calibration is None:
        return
    for stream, measured in calibration.streams.items():
        draw_similarity(folder / f"similarity-{'.'.join(stream)}.png", measured.gram, calibration.times)


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


def draw_similarity(path: Path, gram: GramMatrix, times: Tensor, boundaries: Sequence[float] = (0.9, 0.5)) -> None:
    """The cosine similarity of the features of any two steps, and the times that separate LESA's stages.

    The stages were found in this picture: Cai et al., https://arxiv.org/abs/2602.20497.
    """
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    image = axis.imshow(similarity(gram).numpy(), cmap="viridis", vmax=1.0)
    for boundary in boundaries:
        first = int((times[:-1] > boundary).sum()) - 0.5
        axis.axvline(first, color="white", linewidth=0.8, linestyle="--")
        axis.axhline(first, color="white", linewidth=0.8, linestyle="--")
    axis.set(xlabel="denoising step", ylabel="denoising step")
    axis.set_title("cosine similarity of features; dashed: the paper's stages", fontsize=9, loc="left")
    figure.colorbar(image, ax=axis, shrink=0.9)
    _save(figure, path)


def similarity(gram: GramMatrix) -> Tensor:
    """Cosines [steps, steps] between the features of any two steps, over all calibration samples together."""
    products = gram.matrix[:-1, :-1]
    size = products.diagonal().clamp(min=1e-300).sqrt()
    return products / size / size.unsqueeze(1)


def kind_of(plan: str) -> str:
    """The first word of a plan's name, which plans of different sizes share: ``"paper"`` of ``"paper N=7"``."""
    return plan.replace(",", " ").split()[0]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
