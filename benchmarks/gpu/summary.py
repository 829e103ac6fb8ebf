"""At most thirty lines about all parts, from whatever their files hold."""

import json
from pathlib import Path
from typing import Any

MOST_LINES, MOST_FAILURES = 30, 10
Rows = list[dict[str, Any]]


def load(folder: Path, part: str) -> dict[str, Any] | None:
    """What a part wrote; None: nothing that can be read."""
    try:
        result: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result


def summary(folder: Path, parts: list[str]) -> list[str]:
    """The lines."""
    found = {part: load(folder, part) for part in parts}
    lines = [state(part, result) for part, result in found.items()]
    failures = [f"FAILED {line.splitlines()[0]}" for result in found.values() if result for line in result["failed"]]
    lines += failures[:MOST_FAILURES]  # before the numbers, which may be more than fit
    rows = {part: result["rows"] if result else [] for part, result in found.items()}
    lines += [f"{row['what']}: {' '.join(row['summary'])}" for row in rows.get("correctness", []) if "what" in row]
    lines += [f"{row['what']}: {' '.join(row['summary'])}" for row in rows.get("memcheck", []) if "what" in row]
    lines += kernel_lines(rows.get("kernels", []))
    lines += loop_lines(rows.get("loops", []))
    lines += kan_lines(rows.get("kan", []))
    return lines[:MOST_LINES]


def state(part: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"{part}: left no result"
    how = "done" if result["finished"] else "stopped half-way"
    counts = f"{len(result['rows'])} rows, {len(result['failed'])} failed, {len(result['skipped'])} left out"
    return f"{part}: {how} after {result['seconds']:.0f} s, {counts}"


def kernel_lines(rows: Rows) -> list[str]:
    """The bandwidth of a copy; combine and the head in its measure."""
    copies = [row["gb_per_s"] for row in rows if row["operation"] == "copy"]
    if not copies:
        return []
    lines = [f"copy: {copies[-1]:.0f} GB/s"]
    for row in rows:
        if row.get("provider") != "ours" or "device_median" not in row or row["direction"] != "forward":
            continue
        if row["operation"].startswith(("combine", "head", "gram")) and "FLUX" in row["shape"] + row["operation"]:
            bound = row["bytes"] / copies[-1] / 1e9
            time = row["device_median"]
            lines.append(
                f"{row['operation']}, {row['shape']}: {time * 1e6:.0f} us, {bound / time:.0%} of a copy's rate"
            )
    return lines


def loop_lines(rows: Rows) -> list[str]:
    return [
        f"{row['architecture']}, {row['method']}: {row['speedup']:.2f}x, {row['share_of_ideal']:.1%} of ideal"
        for row in rows
        if "speedup" in row and row["method"] != "full sampler"
    ]


def kan_lines(rows: Rows) -> list[str]:
    """Ours compared with the compiled reference."""
    times = {
        (row["shape"], row["direction"], row["provider"]): row.get("device_median", row.get("wall_median"))
        for row in rows
        if "failed" not in row
    }
    return [
        f"KAN {shape}, {direction}: {times[shape, direction, 'compiled reference'] / time:.2f}x the compiled reference"
        for (shape, direction, provider), time in times.items()
        if provider == "ours" and (shape, direction, "compiled reference") in times
    ]
