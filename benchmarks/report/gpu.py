"""docs/performance.md: what was measured on a GPU, and what had been predicted."""

from typing import Any

from benchmarks.report.performance import DOCUMENT, amount
from benchmarks.report.registry import load, part, table

GPU = "python -m benchmarks.gpu --out benchmarks/results/gpu"
FLUX, VIDEO = "FLUX.1-dev 1024", "HunyuanVideo 480p"

# Microseconds on an H200 that were predicted before anything had run: bytes over 4.3 TB/s, or instructions of the code
# that the compiler makes for sm_90 over what the multiprocessors issue.
PREDICTED = (
    ("combine, 1 of 8", FLUX, "58", "bytes"),
    ("combine, 6 of 8", FLUX, "90 to 97", "bytes"),
    ("gram_row of 8", FLUX, "67", "bytes, and small kernels that add up"),
    ("head, 6 of 8", FLUX, "75 to 100", "instructions: 933 for 64 channels"),
    ("head, 6 of 8", VIDEO, "330 to 400", "instructions: 933 for 64 channels"),
)


@part(DOCUMENT, "gpu correctness", "gpu/correctness.json", command=f"{GPU} --part correctness")
def correctness(measured: Any) -> str:
    """The summary of the tests."""
    lines = []
    for row in measured["rows"]:
        lines.append(f"- {row['what']}: {' '.join(row['summary'])}")
        lines += [f"    - {line}" for line in row.get("failed", [])]
    return "\n".join(lines)


@part(DOCUMENT, "gpu predictions", "gpu/kernels.json", command=None)
def predictions(measured: Any) -> str:
    """Predicted and measured times, and the rate of a copy of the same bytes."""
    times = _forward_seconds(measured)
    rows = []
    for operation, shape, predicted, bound in PREDICTED:
        ours, copy = (times[operation, shape, provider] for provider in ("ours", "copy"))
        rows.append([operation, shape, predicted, f"{ours * 1e6:.0f}", f"{copy / ours:.0%}", bound])
    headings = ["function", "feature", "predicted, us", "measured, us", "of a copy's rate", "predicted from"]
    return table(headings, rows, left=2)


@part(DOCUMENT, "gpu kernels", "gpu/kernels.json", command=f"{GPU} --part kernels")
def kernels(measured: Any) -> str:
    """Both clocks of every function and provider."""
    return table(*_providers([row for row in measured["rows"] if row["operation"] != "copy"]), left=4)


@part(DOCUMENT, "gpu kan", "gpu/kan.json", command=f"{GPU} --part kan")
def kan(measured: Any) -> str:
    """KAN layers by both clocks."""
    return table(*_providers(measured["rows"]), left=4)


def _providers(measured: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in measured:
        if "failed" in row:
            continue
        cells = [row["operation"], row["direction"], row["shape"], row["provider"]]
        times = [f"{row[f'{clock}_median'] * 1e6:.1f} us" for clock in ("device", "wall")]
        rows.append([*cells, *times, f"{row['gb_per_s']:.0f} GB/s", str(row.get("launches", ""))])
    return ["function", "direction", "shape", "provider", "device", "wall", "rate", "launches"], rows


@part(DOCUMENT, "gpu tiles", "gpu/tiles.json", command=None)
def tiles(measured: Any) -> str:
    """The sizes that were tried: those of before in the first row of a kernel, the fastest ones after it."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    eager = {}
    for row in measured["rows"]:
        key = row["kernel"], row["dtype"], row["shape"]
        if row["seconds"] is None:
            eager[key] = row["error"]
        else:
            groups.setdefault(key, []).append(row)
    rows = []
    for key, (before, *others) in groups.items():
        best = sorted(others, key=lambda row: row["seconds"])[:2]
        for row in (before, *best):
            sizes = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
            errors = ["" if e is None else f"{e:.1e}" for e in (row["error"], eager.get(key))]
            rows.append([*key, sizes, f"{row['seconds'] * 1e6:.0f} us", *errors])
    headings = ["kernel", "dtype", "shape", "tiles", "time", "error", "eager error"]
    environment = measured["environment"]
    return f"{table(headings, rows, left=4)}\n\n{environment['device']}; commit {environment['commit']}."


@part(DOCUMENT, "gpu loops", "gpu/loops.json", command=f"{GPU} --part loops")
def loops(measured: Any) -> str:
    """Denoising loops of real architectures."""
    rows = []
    for row in measured["rows"]:
        if "failed" in row:
            continue
        depth = f"{row['blocks']} of {row['published_blocks']}" if row["extrapolated_depth"] else "all"
        peak = "" if row["peak_bytes"] is None else amount(row["peak_bytes"])
        cells = [row["architecture"], row["method"], depth, str(row["full_steps"])]
        cells += [f"{row['seconds_at_full_depth']:.2f} s", f"{row['speedup']:.2f}x", f"{row['share_of_ideal']:.1%}"]
        rows.append([*cells, peak, str(row.get("synchronisations", ""))])
    headings = [
        "model",
        "method",
        "blocks run",
        "full steps",
        "loop",
        "speed-up",
        "of ideal",
        "peak memory",
        "host waits",
    ]
    return table(headings, rows, left=2)


@part("README.md", "gpu", "gpu/kernels.json", command=None)
def headline(measured: Any) -> str:
    """One sentence about the functions that are bound by memory."""
    times = _forward_seconds(measured)
    shares = [
        times[operation, shape, "copy"] / times[operation, shape, "ours"]
        for operation in ("combine, 1 of 8", "combine, 6 of 8")
        for shape in (FLUX, VIDEO)
    ]
    head = [times["head, 6 of 8", shape, "ours"] / times["head, 6 of 8", shape, "copy"] for shape in (FLUX, VIDEO)]
    tests = load("gpu/correctness.json")
    summary = tests["rows"][-1]["summary"][0] if tests else ""
    return (
        f"- On one {measured['environment']['device']}, `combine` runs at {min(shares):.0%} to {max(shares):.0%} of a\n"
        f"  copy's rate on features of FLUX and HunyuanVideo; `fused_output_head`, bound by arithmetic, takes\n"
        f"  {min(head):.1f} to {max(head):.1f} times as long as a copy of its bytes. Tests there: {summary}."
    )


def _forward_seconds(measured: Any) -> dict[tuple[str, str, str], float]:
    """Seconds on the device by operation, shape and provider."""
    return {
        (row["operation"], row["shape"], row["provider"]): row["device_median"]
        for row in measured["rows"]
        if row.get("direction") == "forward" and "device_median" in row
    }
