"""Results of the demo run, and of its denoising loop compared with other caches."""

import statistics
from typing import Any

from benchmarks.report.registry import part, table
from lesa.reports.columns import LEFT, cells


@part("README.md", "demo table", "demo.json", command="python -m benchmarks.demo.run")
def demo_table(rows: Any) -> str:
    """The rows of the demo's report."""
    setting = f"{rows[0]['samples']} held-out digits, {rows[0]['batch']} at a time."
    return f"{table(*cells(rows), left=LEFT)}\n\n{setting}"


@part("README.md", "demo findings", "demo.json", command=None)
def demo_findings(measured: Any) -> str:
    """The sentences of the introduction that contain measured numbers."""
    rows = {(row["plan"], row["method"]): row for row in measured}
    ours, reuse = rows["paper N=7", "LESA"], rows["paper N=7", "reuse"]
    best = rows["paper N=7", "least squares"]
    taylor = max((rows["paper N=7", f"Taylor {order}"] for order in (1, 2)), key=lambda row: row["psnr"])
    theirs = next(row for row in rows.values() if row["method"].startswith("diffusers"))
    on_theirs = rows[theirs["plan"], "LESA"]
    tables = [r for (plan, name), r in rows.items() if plan.startswith("paper") and "KAN" not in name]
    realised = [row["speedup_wall"] / row["speedup_ideal"] for row in tables]
    kan = rows["paper N=7", "LESA, KAN on features"]
    return "\n".join(
        [
            f"- With {ours['full_steps']} full steps of 50, fitted by the paper's two stages: "
            f"**{ours['psnr']:.2f} dB** against the full sampler, {ours['psnr'] - reuse['psnr']:.1f} dB above reuse, "
            f"{ours['psnr'] - taylor['psnr']:+.2f} dB to {taylor['method'].replace('Taylor', 'Taylor order')} and "
            f"{ours['psnr'] - best['psnr']:+.2f} dB to the least-squares combination of the same full features.",
            f"- The full steps matter more than the forecaster: {theirs['method']} with as many full steps, but "
            f"other ones, reaches {theirs['psnr']:.2f} dB; the same LESA predictor on those steps "
            f"{on_theirs['psnr']:.2f} dB.",
            f"- {statistics.median(realised):.0%} of the ideal speed-up arrives on the wall clock at batch "
            f"{ours['batch']}, in the median over methods ({min(realised):.0%} to {max(realised):.0%}: a shared "
            "machine, whose clock wavers by that much); a single image is bound by Python and reaches "
            f"{ours['speedup_wall_batch_1']:.2f}x of "
            f"{ours['speedup_ideal']:.2f}x.",
            f"- A KAN on the features themselves, beyond the paper, gains nothing here: {kan['psnr']:.2f} dB, and its "
            "arithmetic is no work for a CPU.",
        ]
    )


@part("README.md", "loop table", "demo_loop.json", command="python -m benchmarks.demo.loop")
def loop_table(rows: Any) -> str:
    """The share of the ideal speed-up that is reached, compared with other caches."""
    headings = ["batch", "method", "full steps", "inside transformer calls (quartiles)", "denoising loop"]
    return table(
        headings,
        (
            [
                str(row["batch"]),
                row["method"],
                str(row["full_steps"]),
                f"{row['speedup_transformer']:.2f}x, {row['share_transformer']:.1%} of ideal "
                "({:.1%} - {:.1%})".format(*row["share_transformer_quartiles"]),
                f"{row['speedup_loop']:.2f}x, {row['share_loop']:.1%}",
            ]
            for row in rows
        ),
        left=2,
    )
