"""The pictures of the demo's report."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lesa.plan import StepPlan

INK, PALE = "#1f4e79", "#d6e0ea"
COLOURS = {
    "reuse": "#9a9a9a",
    "Taylor 1": "#e0a030",
    "Taylor 2": "#c05020",
    "LESA": INK,
    "least squares": "#3a8f5c",
    "path least squares (default)": "#7a3f9d",
}


def draw_comparison(path: Path, images: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    """Digits [N, 1, 8, 8], a row for each method; ``rows`` are theirs in the report."""
    count = len(next(iter(images.values())))
    figure, axes = plt.subplots(len(images), 1, figsize=(0.62 * count + 2.6, 0.72 * len(images)), layout="constrained")
    for axis, (name, digits), row in zip(axes, images.items(), rows, strict=True):
        # white between the digits, so that neighbours do not run together
        padded = torch.nn.functional.pad(digits, (1, 1, 1, 1), value=-1.0)
        axis.imshow(-padded.squeeze(1).permute(1, 0, 2).flatten(1).numpy(), cmap="gray", vmin=-1, vmax=1)
        quality = "" if row["psnr"] is None else f"\n{row['psnr']:.1f} dB, {row['speedup_wall']:.2f}x"
        axis.set_ylabel(f"{name}{quality}", rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


def draw_plans(path: Path, plans: dict[str, StepPlan], errors: dict[str, list[float]], title: str) -> None:
    """Which steps of each plan run in full, and below how far each method is from the full sampler after each step."""
    figure, (strips, curves) = plt.subplots(
        2, 1, figsize=(7.5, 4.6), height_ratios=[len(plans), 6], sharex=True, layout="constrained"
    )
    for y, plan in enumerate(plans.values()):
        colours = [INK if plan.is_full(step) else PALE for step in range(plan.num_steps)]
        strips.bar(range(plan.num_steps), 0.7, bottom=y - 0.35, width=0.86, color=colours)
    strips.set_yticks(range(len(plans)), [f"{name}: {len(p.full_steps)} full" for name, p in plans.items()], fontsize=8)
    strips.invert_yaxis()
    strips.tick_params(length=0, labelbottom=False)
    strips.spines[:].set_visible(False)
    strips.set_title("full steps (dark) and predicted steps (pale)", fontsize=9, loc="left")
    for name, error in errors.items():
        curves.plot([e or float("nan") for e in error], label=name, color=COLOURS.get(name), linewidth=1.6)
    curves.set_yscale("log")
    curves.set_xlabel("denoising step")
    curves.set_ylabel("RMS error of the latents")
    curves.set_title(title, fontsize=9, loc="left")
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
