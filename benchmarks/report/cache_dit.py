"""Our forecasters in cache-dit compared with cache-dit's calibrators."""

from typing import Any

from benchmarks.report.registry import part, table


@part("docs/cache-dit.md", "calibrators", "cache_dit.json", command="python -m benchmarks.cache_dit")
def calibrators(rows: Any) -> str:
    """Quality on the demo model, cost on both models."""
    costs = {(row["by"], row["method"]): row for row in rows if row["psnr"] is None}
    quality = [row for row in rows if row["psnr"] is not None]

    def cells(row: dict[str, Any]) -> list[str]:
        cost = costs[row["by"], row["method"]]
        cells = [row["by"], row["method"], f"{row['psnr']:.2f} dB"]
        if cost["ms"] is None:  # cache-dit adds the last residual again
            return [*cells, "", "", "", ""]
        return [
            *cells,
            f"{row['ms']:.2f} ms",
            f"{cost['ms']:.2f} ms",
            f"{cost['allocated_features']:.1f}",
            f"{cost['kept_features']:.1f}",
        ]

    first, wide = quality[0], next(iter(costs.values()))
    small = max(row["feature_bytes"] for row in quality) / 2**10
    large = max(row["feature_bytes"] for row in costs.values()) / 2**20
    setting = (
        f"Quality: {first['images']} digits of the demo's model, {first['full_steps']} full steps of {first['steps']}, "
        "against the full sampler. Time of the predictions of one step: "
        f"demo on features of {small:.0f} KiB; wide on a FLUX with random weights and features of {large:.0f} MiB, "
        f"{wide['full_steps']} full steps of {wide['steps']}. "
        "Allocated and kept: in features of the image's tokens, at the last predicted step of the wide model."
    )
    headings = ["by", "calibrator", "PSNR", "time, demo", "time, wide", "allocated", "kept"]
    return f"{table(headings, map(cells, quality), left=2)}\n\n{setting}"
