"""KAN layers of several libraries compared."""

from typing import Any

from benchmarks.report.registry import part, table


@part("docs/kan.md", "kan layers", "kan_layers.json", command="python -m benchmarks.kan_layers")
def kan_layers(rows: Any) -> str:
    """Times, and bytes kept for the backward pass; layers that compute another function are in parentheses."""
    headings = ["rows, in → out, grid", "layer", "forward", "to ours", "training step", "to ours", "kept for backward"]
    return table(
        headings,
        (
            [
                f"{row['rows']}, {row['in_features']} → {row['out_features']}, {row['grid_size']}",
                row["layer"] if row["same_function"] else f"({row['layer']})",
                f"{row['forward_ms']:.3g} ms",
                f"{row['forward_to_ours']:.2f}x",
                f"{row['training_ms']:.3g} ms",
                f"{row['training_to_ours']:.2f}x",
                f"{row['kept_bytes'] / 1e6:.2f} MB",
            ]
            for row in rows
        ),
        left=2,
    )
