"""The effect of the choice of full steps and coefficients on the demo model."""

from typing import Any

from benchmarks.report.registry import part, table

COMMAND = "python -m benchmarks.plans"
REFINING = "python -m benchmarks.refining"
DEFAULT = "path least squares (default)"


@part("README.md", "calibration findings", "plans.json", command=COMMAND)
def findings(measured: Any) -> str:
    """The sentences of the introduction that contain measured numbers."""
    budgets = {row["full_steps"]: row for row in measured["budgets"]}
    paper = {row["full_steps"]: row for row in measured["samplers"] if row["sampler"] == "50 steps"}
    ten, eight = budgets[10]["psnr"][DEFAULT], budgets[8]["psnr"][DEFAULT]
    gains = [row["best"] - row["paper"] for row in measured["samplers"]]
    return "\n".join(
        [
            f"- A calibration finds full steps and coefficients: **{ten:.1f} dB** with 10 full steps of 50 and "
            f"{eight:.1f} dB with 8, where the paper's full steps reach {paper[10]['paper']:.1f} and "
            f"{paper[8]['paper']:.1f} dB with the same forecaster.",
            f"- Over other schedules, step counts, guidance and solvers the calibrated plan is {min(gains):.1f} to "
            f"{max(gains):.1f} dB above the paper's with as many full steps.",
            f"- With nothing calibrated, `enable(pipe, speedup=5)` reaches "
            f"{budgets[10]['even']['Taylor 2 in time']:.1f} dB.",
        ]
    )


@part("docs/calibration.md", "budgets", "plans.json", command=COMMAND)
def budgets(measured: Any) -> str:
    """A row for each number of full steps."""
    rows = measured["budgets"]
    names = [name for name in rows[0]["psnr"] if name != "least squares per channel"]  # removed from the library
    headings = ["full steps", *names, "evenly spaced, Taylor 2 in time", "predicted"]
    return table(
        headings,
        (
            [
                str(row["full_steps"]),
                *(f"{row['psnr'][name]:.1f}" for name in names),
                f"{row['even']['Taylor 2 in time']:.1f}",
                f"{row['predicted_error']:.4f}",
            ]
            for row in rows
        ),
        left=0,
    )


@part("docs/calibration.md", "samplers", "plans.json", command=None)
def samplers(measured: Any) -> str:
    """A row for each sampler and budget."""
    headings = ["sampler", "full steps", "paper's plan", "calibrated plan"]
    return table(
        headings,
        (
            [row["sampler"], str(row["full_steps"]), f"{row['paper']:.1f} dB", f"{row['best']:.1f} dB"]
            for row in measured["samplers"]
        ),
        left=1,
    )


@part("docs/calibration.md", "samples", "plans.json", command=None)
def samples(measured: Any) -> str:
    """A row for each number of calibration samples."""
    rows = measured["samples"]
    headings = ["samples", *(f"{budget} full steps" for budget in rows[0]["psnr"]), "seconds"]
    return table(
        headings,
        (
            [str(row["samples"]), *(f"{psnr:.1f} dB" for psnr in row["psnr"].values()), f"{row['seconds']:.1f}"]
            for row in rows
        ),
        left=0,
    )


@part("docs/calibration.md", "resampled", "plans.json", command=None)
def resampled(measured: Any) -> str:
    """A row for each other number of steps."""
    headings = ["steps", "full steps", "calibrated on these steps", "resampled from 50"]
    return table(
        headings,
        (
            [str(row["steps"]), str(row["full_steps"]), f"{row['own']:.1f} dB", f"{row['resampled']:.1f} dB"]
            for row in measured["resampled"]
        ),
        left=0,
    )


@part("docs/calibration.md", "refined", "refining.json", command=REFINING)
def refined(measured: Any) -> str:
    """A row for each budget."""
    headings = ["full steps", "smallest predicted error", "best of six on 16 samples"]
    return table(
        headings,
        (
            [str(row["full_steps"]), f"{row['predicted_best']:.1f} dB", f"{row['refined']:.1f} dB"]
            for row in measured["refined"]
        ),
        left=0,
    )


@part("docs/calibration.md", "trained", "refining.json", command=None)
def trained(measured: Any) -> str:
    """A row for each plan."""
    rows = measured["trained"]
    # training the fitted predictor further in two stages was worse than both, and was removed from the library
    names = [name for name in rows[0]["psnr"] if name != "inner products, then two stages"]
    headings = ["10 full steps", *names, "inner products take"]
    return table(
        headings,
        ([row["plan"], *(f"{row['psnr'][name]:.1f} dB" for name in names), f"{row['seconds']:.0f} s"] for row in rows),
    )
