"""Compares all methods on all plans of the demo model, and draws pictures.

python -m benchmarks.demo.run --out out/comparison
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline
from rich.console import Console

from benchmarks.demo.measure import compare, error_along_the_way
from benchmarks.demo.methods import DEFAULT, INTERVALS, LIVE_INTERVAL, NUM_STEPS, all_methods, calibrated_methods
from benchmarks.demo.pictures import draw_plans
from lesa.arguments import whole
from lesa.calibration.calibrate import calibrate
from lesa.calibration.calibration import Calibration
from lesa.demo.model import WEIGHTS, call_of, images_of, load_pipeline
from lesa.demo.pictures import draw_comparison
from lesa.demo.run import CALIBRATION_SEEDS, CONFIG, HELD_OUT_SEEDS, SHOWN, collect_digits, fit_digits
from lesa.evaluation.methods import Method
from lesa.files import write_text
from lesa.predictor.predictor import LesaPredictor
from lesa.reports.columns import console_table
from lesa.statistics.gram import GramMatrix
from lesa.tables.plan import StepPlan
from lesa.training.trajectories import Trajectories


def run_comparison(
    out: Path,
    *,
    held_out: int = len(HELD_OUT_SEEDS),
    batch: int = 256,
    timing_rounds: int = 5,
    intervals: Sequence[int] = INTERVALS,
) -> None:
    """Write the comparison to the folder ``out``; ``intervals``: those of the paper's plans."""
    whole("held_out", held_out, least=1)
    whole("timing_rounds", timing_rounds, least=0)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    start = time.monotonic()
    pipeline = load_pipeline()
    console.print(
        f"A FLUX of {pipeline.transformer.num_parameters() / 1e6:.2f} M parameters draws digits in {NUM_STEPS} steps.\n"
        f"[bold]1.[/] It samples {len(CALIBRATION_SEEDS)} digits normally while its features are recorded."
    )
    trajectories = collect_digits(pipeline)
    console.print(f"[bold]2.[/] A LESA predictor for the paper's plan with interval {LIVE_INTERVAL} is fitted to them.")
    predictors = {
        n: fit_digits(trajectories, n) if n == LIVE_INTERVAL else load_predictor(f"lesa-n{n}") for n in intervals
    }
    console.print("[bold]3.[/] A calibration finds the best full steps, and predictors are fitted to it.")
    calibration = calibrate(pipeline, [call_of(CALIBRATION_SEEDS)], search=False)
    best = calibrated_methods(calibration, trajectories, CONFIG, intervals)
    kan = load_predictor(f"lesa-kan-n{LIVE_INTERVAL}")
    methods = all_methods(predictors, gram_of(trajectories), kan, best)
    console.print(f"[bold]4.[/] {len(methods)} methods draw {held_out} digits from other seeds, interleaved.")

    def keep(rows: list[dict[str, Any]]) -> None:
        """Save the rows after every call, so that an interrupted run keeps its results."""
        write_text(out / "report.json", json.dumps(keep_better_taylorseer(rows), indent=1) + "\n")

    seeds = HELD_OUT_SEEDS[:held_out]
    rows = compare(pipeline, methods, seeds, batch=batch, timing_rounds=timing_rounds, keep=keep)
    rows = keep_better_taylorseer(rows)
    write_text(out / "report.json", json.dumps(rows, indent=1) + "\n")
    shown = [m for m in methods if m.timed and m.plan in ("every step", f"paper N={LIVE_INTERVAL}")]
    count = len(StepPlan.paper(NUM_STEPS, LIVE_INTERVAL).full_steps)
    shown += [m for m in best if m.plan == f"calibrated, {count} steps" and m.name == DEFAULT]
    draw(out, pipeline, shown, rows, calibration, intervals)
    console.print(console_table(rows, title=f"{rows[0]['samples']} held-out digits against the full sampler"))
    console.print(f"Wrote report.json, comparison.png and plan.png to {out} after {time.monotonic() - start:.0f} s.")


def load_predictor(name: str) -> LesaPredictor:
    """A predictor of the package, which ``lesa fit demo --out lesa/demo/weights/NAME`` has made."""
    return LesaPredictor.from_pretrained(WEIGHTS / name)


def gram_of(trajectories: Trajectories) -> GramMatrix:
    """The inner products of recorded features."""
    gram = GramMatrix(trajectories.num_steps)
    for features in trajectories.batches(trajectories.samples):
        for step in range(trajectories.num_steps):
            gram.update(step, features[:, step])
    return gram


def keep_better_taylorseer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the rows of diffusers' TaylorSeer except those of the better order."""
    theirs = [row for row in rows if row["method"].startswith("diffusers")]
    best = max(theirs, key=lambda row: row["psnr"])
    return [row for row in rows if row not in theirs or row is best]


def draw(
    out: Path,
    pipeline: FluxPipeline,
    methods: list[Method],
    rows: list[dict[str, Any]],
    calibration: Calibration,
    intervals: Sequence[int],
) -> None:
    """Draw the two pictures: methods on the plan of the trained predictor, and on the best plan of the same size."""
    seeds = HELD_OUT_SEEDS[:SHOWN]
    images = {}
    for method in methods:
        with method.enabled(pipeline):
            images[method.name] = images_of(pipeline(**call_of(seeds)))
    shown = [next(r for r in rows if (r["method"], r["plan"]) == (m.name, m.plan)) for m in methods]
    draw_comparison(out / "comparison.png", images, shown)
    errors = error_along_the_way(pipeline, methods, HELD_OUT_SEEDS[:128])
    del errors[methods[0].name]
    plans = {f"N={interval}": StepPlan.paper(NUM_STEPS, interval) for interval in intervals}
    plans |= {f"best {count}": calibration.plan(count) for count in (len(p.full_steps) for p in list(plans.values()))}
    draw_plans(out / "plan.png", plans, errors, f"distance from the full sampler along the way, N={LIVE_INTERVAL}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    run_comparison(parser.parse_args().out)


if __name__ == "__main__":
    main()
