"""What training keeps and takes, and what one predictor for every schedule loses."""

import statistics
from typing import Any

from benchmarks.report.registry import part, table
from lesa.calibration.footprint import readable, trajectory_bytes

COST = "training_cost.json"
COMMAND = "python -m benchmarks.training_cost"


@part("docs/training.md", "kept", None, command=None)
def kept(_: Any) -> str:
    """By formula from the arguments, which a test compares with the sizes of real files."""
    prompts, steps, tokens, channels, batch = 100, 50, 4096, 3072, 4
    rows = [
        [
            "every feature, as the released recipe has it",
            f"all {tokens}",
            trajectory_bytes(prompts, steps, tokens, channels),
        ],
        *(
            ["`collect(..., tokens=...)`", str(some), trajectory_bytes(prompts, steps, some, channels)]
            for some in (1024, 512, 128)
        ),
        [f"`LiveTrajectories`, one batch of {batch}, in memory", "512", trajectory_bytes(batch, steps, 512, channels)],
    ]
    return table(["kept", "tokens", "bytes"], [[what, count, readable(int(size))] for what, count, size in rows])


@part("docs/training.md", "kept quality", COST, command=f"{COMMAND} --part quality")
def kept_quality(measured: Any) -> str:
    rows = [row for row in measured if row["kind"] == "quality"]
    made = [[str(r["tokens"]), r["dtype"], readable(r["bytes"]), f"{r['psnr']:.2f} dB"] for r in rows]
    setting = f"LESA on the paper's plan N = 7, {rows[0]['samples']} held-out digits."
    return f"{table(['tokens', 'dtype', 'kept', 'PSNR'], made, left=2)}\n\n{setting}"


@part("docs/training.md", "training time", COST, command=None)
def training_time(measured: Any) -> str:
    rows = [row for row in measured if row["kind"] == "time"]
    if not rows:
        return "Not measured yet."
    names = {"lesa": "an interval in one pass", "step by step": "step by step, as the released code"}
    return table(
        ["stage", "way", "tokens", "time", "features"],
        [[r["stage"], names[r["way"]], str(r["tokens"]), f"{r['seconds']:.2f} s", readable(r["bytes"])] for r in rows],
        left=2,
    )


@part("docs/training.md", "anchors", "anchors.json", command="python -m benchmarks.anchors")
def anchors(rows: Any) -> str:
    """Each setting, then the difference over all of them."""
    names = ["specialist", "anchors", "least squares", "Taylor 2"]
    lines = [
        [
            f"{row['steps']} steps, shift {row['shift']}{'' if row['trained'] else ' (not trained on)'}",
            f"{row['interval']}",
            f"{row['full_steps']}",
            *(f"{row['psnr'][name]:.2f}" for name in names),
            f"{row['psnr']['anchors'] - row['psnr']['specialist']:+.2f}",
        ]
        for row in rows
    ]
    losses = [row["psnr"]["anchors"] - row["psnr"]["specialist"] for row in rows]
    headings = ["schedule", "N", "full steps", "specialist", "one for all", "least squares", "Taylor 2", "difference"]
    first = rows[0]
    return (
        f"{table(headings, lines)}\n\n"
        f"One predictor of {first['parameters']:,} parameters, trained in {first['training_seconds']:.0f} s, against a "
        f"specialist for each row: {statistics.mean(losses):+.2f} dB on average, from {min(losses):+.2f} to "
        f"{max(losses):+.2f}. {first['samples']} held-out digits."
    )
