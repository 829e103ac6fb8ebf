"""The picture of the demo's report."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor


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
