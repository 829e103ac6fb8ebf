"""A picture of the plans, with the error after each step."""

from pathlib import Path

from matplotlib import pyplot as plt

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


def draw_plans(path: Path, plans: dict[str, StepPlan], errors: dict[str, list[float]], title: str) -> None:
    """Draw the full steps of each plan, and below the error of each method against the full sampler after each step."""
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
