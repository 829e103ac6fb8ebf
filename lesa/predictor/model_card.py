"""The README.md of a saved predictor: what it was made for, how to use it, and its measurements."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lesa.files import write_text
from lesa.files.tensors import SHOWN
from lesa.predictor.description import Description
from lesa.reports.columns import cells
from lesa.tables.times import shown

FILE = "README.md"
MARK = "<!-- Written by lesa, and again at every save. Without this line it is yours and stays. -->"
Report = Sequence[Mapping[str, Any]] | str | Path


def describe(
    predictor: Description,
    parameters: int,
    report: Report | None = None,
    *,
    name: str | None = None,
    streams: Sequence[tuple[str, str]] = (),
) -> str:
    """The text of the card, in Markdown.

    Args:
        predictor: the one that is saved, or one of several alike.
        parameters: how many it has.
        report: rows as ``lesa evaluate`` and ``lesa demo`` write them, or the file that holds them.
        name: of the repository.
        streams: (component, branch) of each predictor, where there are several.

    Raises:
        ValueError: if the report is not a list of rows.
    """
    config, plan = predictor.config, predictor.plan
    where = json.dumps(name or "folder or repository of this card")
    steps = config.num_steps
    chosen = "" if plan is not None else f", lesa.StepPlan.paper({steps}, interval=7)"
    parts = [
        MARK,
        f"# LESA predictor for {steps} steps",
        "Predicts what the last block of a diffusion transformer gives at the steps that a plan does not run, from the "
        "features of earlier steps ([LESA](https://arxiv.org/abs/2602.20497)).",
        "```python\n"
        "import lesa\n\n"
        f"with lesa.enable(pipeline, {where}{chosen}):\n"
        f"    image = pipeline(prompt, num_inference_steps={steps}).images[0]\n"
        "```",
        "## What it was made for",
        _table(["", ""], facts(predictor, parameters, streams)),
        "It belongs to its schedule: for another number of steps, time shift or solver it is refused."
        if predictor.schedule is not None
        else "The schedule it was trained on is not known, so a wrong one of as many steps cannot be noticed.",
    ]
    rows = _rows(report)
    if rows:
        parts += ["## Measured", _evaluation(rows)]
    return "\n\n".join(parts) + "\n"


def write(card: ModelCard, directory: Path) -> None:
    """Write it into a folder, unless there is a README.md that a user has written.

    Raises:
        OSError: that names the file, if it cannot be written.
    """
    path = directory / FILE
    if not path.exists() or MARK.encode() in path.read_bytes():
        write_text(path, str(card))


def facts(predictor: Description, parameters: int, streams: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """What there is to say of a predictor: (name, value) each."""
    config, plan = predictor.config, predictor.plan
    rows = [("steps", str(config.num_steps))]
    if plan is not None:
        rows.append(("full steps", f"{', '.join(map(str, plan.full_steps))} ({plan.speedup:.2f}x fewer than all)"))
    if predictor.schedule is not None:
        rows.append(("noise levels", shown(predictor.schedule)))
    if streams:
        rows.append(("predictors", ", ".join(".".join(stream) for stream in streams)))
    rows += [
        ("stages", f"{len(config.windows)}, boundaries {config.boundaries}, windows {config.windows}"),
        ("gates", f"KAN {config.gate_widths}"),
        ("features", "linear in them" if config.latent == "linear" else "a KAN on them"),
        ("parameters", f"{parameters:,}"),
    ]
    rows += [
        (f"training, {stage}", f"mean absolute error {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} batches")
        for stage, losses in predictor.losses.items()
        if losses
    ]
    return rows


def _rows(report: Report | None) -> list[Mapping[str, Any]]:
    if report is None:
        return []
    if not isinstance(report, str | Path):
        return _checked(report)
    try:
        return _checked(json.loads(Path(report).read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{report} is no report: {str(error)[:SHOWN]}") from error


def _checked(rows: Any) -> list[Mapping[str, Any]]:
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("a report is a list of rows, each a mapping from names such as 'method' and 'psnr' to values")
    for row in rows:
        if not isinstance(row.get("samples", 0), int | float):
            raise ValueError("samples of a row is how many there were")
        environment = row.get("environment", {})
        if not isinstance(environment, Mapping) or not isinstance(environment.get("versions", {}), Mapping):
            raise ValueError("environment of a row is a mapping, with the versions as another")
    return list(rows)


def _evaluation(rows: list[Mapping[str, Any]]) -> str:
    """The rows as a table, and what they were measured on."""
    parts = [_table(*cells(rows))]
    samples = {row["samples"] for row in rows if "samples" in row}
    if samples:
        parts.append(f"{', '.join(map(str, sorted(samples)))} samples, against the full sampler on the same seeds.")
    parts += dict.fromkeys(_measured_on(row["environment"]) for row in rows if "environment" in row)
    return "\n\n".join(parts)


def _measured_on(environment: Mapping[str, Any]) -> str:
    versions = (f"{name} {version}" for name, version in environment.get("versions", {}).items() if version)
    commit = environment.get("commit")
    return f"Measured on {environment.get('device')}: {', '.join(versions)}{f'; lesa at {commit}' if commit else ''}."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in line)} |" for line in lines)
