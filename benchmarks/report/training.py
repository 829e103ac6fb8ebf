"""The memory and the time of training."""

from typing import Any

from benchmarks.report.registry import part, table
from lesa.training.footprint import readable, trajectory_bytes

COST = "training_cost.json"
COMMAND = "python -m benchmarks.training_cost"


@part("docs/training.md", "kept", None, command=None)
def kept(_: Any) -> str:
    """Computed by formula; a test compares the formula with the sizes of real files."""
    prompts, steps, tokens, channels = 100, 50, 4096, 3072
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
