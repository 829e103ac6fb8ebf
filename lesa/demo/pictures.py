"""The pictures of the demo's report."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from lesa.evaluation.pictures import INK, strips
from lesa.tables.plan import StepPlan

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
        padded = torch.nn.functional.pad(digits, (1, 1, 1, 1))
        axis.imshow(1 - padded.squeeze(1).permute(1, 0, 2).flatten(1).numpy(), cmap="gray", vmin=0, vmax=1)
        quality = "" if row["psnr"] is None else f"\n{row['psnr']:.1f} dB, {row['speedup_wall']:.2f}x"
        axis.set_ylabel(f"{name}{quality}", rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


def draw_plans(path: Path, plans: dict[str, StepPlan], errors: dict[str, list[float]], title: str) -> None:
    """Which steps of each plan run in full, and below how far each method is from the full sampler after each step."""
    figure, (above, curves) = plt.subplots(
        2, 1, figsize=(7.5, 4.6), height_ratios=[len(plans), 6], sharex=True, layout="constrained"
    )
    strips(above, {name: (plan.full_steps, plan.num_steps) for name, plan in plans.items()})
    above.tick_params(labelbottom=False)
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
