"""How near a number of evaluations comes to the exact solution."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.drawing import COLOURS, figure
from benchmarks.report.registry import load, part, picture, table

DIGITS, PICTURES = "evaluations_digits.json", "evaluations_pictures.json"
COMMAND = "python -m benchmarks.evaluations"
METHODS = {
    "plain sampler": "Euler",
    "DPM-Solver++": "DPM-Solver++",
    "UniPC": "UniPC",
    "Heun": "Heun",
    "50 steps, calibrated": "50 steps, calibrated, the others predicted",
    "substeps": "substeps, nothing calibrated",
    "substeps, calibrated": "substeps, calibrated",
}


def _found(measured: Any, guidance: float, method: str) -> dict[int, float]:
    """PSNR against the exact solution by number of evaluations."""
    rows = [row for row in measured["rows"] if row["guidance"] == guidance and row["method"] == method]
    return {row["evaluations"]: row["psnr_exact"] for row in rows}


def _scales(measured: Any) -> list[float]:
    return sorted({row["guidance"] for row in measured["rows"]})


def _tables(measured: Any) -> str:
    """A table for each guidance scale: a row for each method, a column for each number of evaluations."""
    parts = []
    for guidance in _scales(measured):
        counts = sorted(_found(measured, guidance, "substeps"))
        rows = [
            [title, *(f"{found[n]:.1f}" if (n := count) in found else "" for count in [*counts, 50])]
            for method, title in METHODS.items()
            if (found := _found(measured, guidance, method))
        ]
        scale = "No guidance" if guidance == 1 else f"Guidance {guidance:g}"
        parts.append(f"{scale}:\n\n" + table(["method", *map(str, counts), "50"], rows))
    return "\n\n".join(parts)


@part("docs/evaluations.md", "pictures", PICTURES, command=f"{COMMAND} --pictures DIR --seeds 16 --rounds 0")
def pictures(measured: Any) -> str:
    """The picture model."""
    return _tables(measured)


@part("docs/evaluations.md", "digits", DIGITS, command=COMMAND)
def digits(measured: Any) -> str:
    """The demo model."""
    return _tables(measured)


@part("docs/evaluations.md", "time", DIGITS, command=COMMAND)
def time(measured: Any) -> str:
    """A sentence for each batch."""
    return "\n".join(
        f"- Batch {row['batch']}, {row['method']}: {1000 * row['substeps_s']:.0f} ms instead of "
        f"{1000 * row['plain_s']:.0f} ms, {row['ratio']:.2f} times as long."
        for row in measured["timing"]
    )


@part("README.md", "evaluation findings", PICTURES, command=f"{COMMAND} --pictures DIR --seeds 16 --rounds 0")
def findings(measured: Any) -> str:
    """The headline: 10 and 20 evaluations of the picture model and of the digits, without and with guidance."""
    lines = []
    other: Any = load(DIGITS)
    for name, result in (("pictures", measured), ("digits", other)):
        for guidance in [] if result is None else _scales(result):
            plain, ours = (_found(result, guidance, method) for method in ("plain sampler", "substeps, calibrated"))
            free = _found(result, guidance, "substeps")
            scale = "" if guidance == 1 else f", guidance {guidance:g}"
            lines.append(
                f"- {name.capitalize()}{scale}: 10 and 20 evaluations have a PSNR of **{ours[10]:.1f}** and "
                f"**{ours[20]:.1f} dB** to the exact solution with a calibration, {free[10]:.1f} and {free[20]:.1f} dB "
                f"without one; 10, 20 and 50 plain steps {plain[10]:.1f}, {plain[20]:.1f} and {plain[50]:.1f} dB."
            )
    return "\n".join(lines)


@picture("docs/images/evaluations.svg", PICTURES)
def curves(measured: Any) -> Figure:
    """Distance to the exact solution against evaluations, a panel for each guidance scale."""
    scales = _scales(measured)
    made, axes = figure(len(scales), height=3.6, sharey=True)
    for axis, guidance in zip(axes, scales, strict=True):
        for (method, title), colour in zip(METHODS.items(), COLOURS, strict=True):
            found = {n: value for n, value in sorted(_found(measured, guidance, method).items()) if n <= 20}
            axis.plot(list(found), list(found.values()), marker="o", markersize=3, color=colour, label=title)
        fifty = _found(measured, guidance, "plain sampler")[50]
        axis.axhline(fifty, color="0.4", linestyle="--", linewidth=1)
        axis.annotate("50 plain steps", (20, fifty), ha="right", va="bottom", color="0.4")
        axis.set_title("no guidance" if guidance == 1 else f"guidance {guidance:g}", fontsize=9)
        axis.set_xlabel("evaluations")
    axes[0].set_ylabel("PSNR to the exact solution, dB")
    axes[0].legend(fontsize=6, loc="lower center", bbox_to_anchor=(1.0, 1.08), ncols=3)
    return made
