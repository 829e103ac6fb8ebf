"""Writes the measured parts of README.md from committed results: ``make readme``.

A part stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lesa.demo.run import cells

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def demo_table() -> str:
    """The rows of the demo's report, with what they were measured on."""
    rows = json.loads((RESULTS / "demo.json").read_text())
    lines = [
        "| full steps | method | count | ideal | wall clock | 1 image | PSNR | SSIM | classifier | kept |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    first = rows[0]
    setting = f"{first['samples']} held-out digits, {first['batch']} at a time, {_machine(first['environment'])}"
    return "\n".join([*lines, "", setting])


def _machine(environment: dict[str, Any]) -> str:
    """What a result was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{environment['threads']} threads of {environment['device']}; {versions}; commit {environment['commit']}."


def demo_findings() -> str:
    """The sentences of the introduction that hold numbers."""
    rows = {(row["plan"], row["method"]): row for row in json.loads((RESULTS / "demo.json").read_text())}
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
            f"- {min(realised):.0%} to {max(realised):.0%} of the ideal speed-up arrives on the wall clock at batch "
            f"{ours['batch']}; a single image is bound by Python and reaches {ours['speedup_wall_batch_1']:.2f}x of "
            f"{ours['speedup_ideal']:.2f}x.",
            f"- A KAN on the features themselves, beyond the paper, gains nothing here: {kan['psnr']:.2f} dB, and its "
            "arithmetic is no work for a CPU.",
        ]
    )


def loop_table() -> str:
    """How much of the ideal speed-up arrives, beside other caches."""
    rows = json.loads((RESULTS / "demo_loop.json").read_text())
    lines = ["| batch | method | full steps | inside transformer calls | denoising loop |", "|--:|---|--:|--:|--:|"]
    for row in rows:
        calls = f"{row['speedup_transformer']:.2f}x, {row['share_transformer']:.1%} of ideal"
        loop = f"{row['speedup_loop']:.2f}x, {row['share_loop']:.1%}"
        lines.append(f"| {row['batch']} | {row['method']} | {row['full_steps']} | {calls} | {loop} |")
    return "\n".join([*lines, "", _machine(rows[0]["environment"])])


PARTS: dict[str, Callable[[], str]] = {
    "demo table": demo_table,
    "demo findings": demo_findings,
    "loop table": loop_table,
}


def rendered(text: str) -> str:
    """README text with all parts made anew.

    Raises:
        ValueError: if a part has no place in the text.
    """
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        part = make().replace("\\", r"\\")
        text, places = pattern.subn(rf"\g<1>{part}\n\g<2>", text)
        if places != 1:
            raise ValueError(f"README.md has {places} places for {name!r}, not one")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))
