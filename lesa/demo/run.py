"""The guided run: calibrate, fit, accelerate, compare; writes ``report.json``, ``comparison.png`` and ``plan.png``."""

import dataclasses
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from diffusers import FluxPipeline
from rich.console import Console

from lesa.api.choose import UNCALIBRATED
from lesa.arguments import whole
from lesa.calibration.calibrate import calibrate
from lesa.calibration.calibration import Calibration
from lesa.demo.model import call_of, digit_metric, images_of, load_pipeline
from lesa.demo.pictures import draw_comparison
from lesa.evaluation.evaluate import evaluate
from lesa.evaluation.methods import FULL, Method, predicted
from lesa.evaluation.pictures import draw_strips
from lesa.files import write_text
from lesa.forecasters import Reuse, Taylor
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.reports.columns import console_table
from lesa.tables.plan import StepPlan
from lesa.training.collect import collect
from lesa.training.trajectories import Trajectories
from lesa.training.two_stage import fit

NUM_STEPS, INTERVAL = 50, 7
CALIBRATION_SEEDS = range(10_000, 10_096)
HELD_OUT_SEEDS = range(512)
BATCH = 256
SHOWN = 16  # digits in the picture
CONFIG = LesaConfig(NUM_STEPS, hidden_dim=64)
PAPER = StepPlan.paper(NUM_STEPS, INTERVAL)
COUNTS = (13, len(PAPER.full_steps), 8)  # full steps of the calibrated plans


def run_demo(out: Path, *, held_out: int = len(HELD_OUT_SEEDS), timing_rounds: int = 5) -> None:
    """Everything that ``lesa demo`` shows, with the files in ``out``; about two minutes on two cores."""
    whole("held_out", held_out, least=1)
    whole("timing_rounds", timing_rounds, least=0)
    out.mkdir(parents=True, exist_ok=True)
    console, start, pipeline = Console(), time.monotonic(), load_pipeline()
    console.print(
        f"A FLUX of {pipeline.transformer.num_parameters() / 1e6:.2f} M parameters draws digits in {NUM_STEPS} steps.\n"
        f"[bold]1.[/] It samples {len(CALIBRATION_SEEDS)} digits normally: a calibration finds the best full steps."
    )
    calibration = calibrate(pipeline, [call_of(CALIBRATION_SEEDS)], search=False)
    console.print(f"[bold]2.[/] A LESA predictor for the paper's plan with interval {INTERVAL} is trained.")
    methods = demo_methods(calibration, fit_digits(collect_digits(pipeline), INTERVAL))
    console.print(f"[bold]3.[/] {len(methods)} methods draw {held_out} digits from other seeds, interleaved.")
    seeds = HELD_OUT_SEEDS[:held_out]
    batches = [seeds[first : first + BATCH] for first in range(0, len(seeds), BATCH)]

    def keep(rows: list[dict[str, Any]]) -> None:
        """After every call, so that an interrupted run keeps what it has measured."""
        write_text(out / "report.json", json.dumps(rows, indent=1) + "\n")

    rows = evaluate(
        pipeline,
        methods,
        [call_of(batch) for batch in batches],
        metrics=["psnr", "ssim", digit_metric],
        images=images_of,
        rounds=max(1, timing_rounds // len(batches)),
        keep=keep,
    )
    draw(out, pipeline, methods, rows)
    console.print(console_table(rows, title=f"{rows[0]['samples']} held-out digits against the full sampler"))
    console.print(f"Wrote report.json, comparison.png and plan.png to {out} after {time.monotonic() - start:.0f} s.")


def demo_methods(calibration: Calibration, predictor: LesaPredictor) -> list[Method]:
    """The full sampler, plain samplers of fewer steps, forecasters on the paper's plan, and calibrated plans."""
    count, forecasters = len(PAPER.full_steps), calibration.forecasters()
    plain = [Method("plain sampler", f"{n} steps", lambda _: nullcontext(), {"num_inference_steps": n}) for n in COUNTS]
    paper = {"reuse": Reuse(), "Taylor 2": Taylor(2), "LESA": predictor}
    return [
        FULL,
        *plain,
        *(predicted(name, forecaster, PAPER, f"paper N={INTERVAL}") for name, forecaster in paper.items()),
        predicted("Taylor 2 in time", UNCALIBRATED, StepPlan.even(calibration.times, count), f"even, {count} steps"),
        *(predicted("path least squares", forecasters, calibration.plan(n), f"calibrated, {n} steps") for n in COUNTS),
    ]


def collect_digits(pipeline: FluxPipeline) -> Trajectories:
    """The features of the calibration digits."""
    return collect(pipeline, [call_of(CALIBRATION_SEEDS)])


def fit_digits(trajectories: Trajectories, interval: int, latent: Literal["linear", "kan"] = "linear") -> LesaPredictor:
    """The demo's predictor for the paper's plan with this interval."""
    return fit(trajectories, StepPlan.paper(NUM_STEPS, interval), dataclasses.replace(CONFIG, latent=latent))


def draw(out: Path, pipeline: FluxPipeline, methods: list[Method], rows: list[dict[str, Any]]) -> None:
    """The digits of methods with as many full steps as the paper's plan, and the full steps of all plans."""
    chosen = [i for i, row in enumerate(rows) if i == 0 or row["full_steps"] == len(PAPER.full_steps)]
    images = {}
    for index in chosen:
        with methods[index].enabled(pipeline):
            made = pipeline(**{**call_of(HELD_OUT_SEEDS[:SHOWN]), **methods[index].options})
        images[f"{methods[index].name}, {methods[index].plan}"] = images_of(made)
    draw_comparison(out / "comparison.png", images, [rows[index] for index in chosen])
    plans = {row["plan"]: (row["full"], NUM_STEPS) for row in rows[1:] if row["method"] != "plain sampler"}
    draw_strips(out / "plan.png", plans)
