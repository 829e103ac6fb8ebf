"""Compares plans and forecasters on the demo model: for every budget, and on other schedules and solvers.

    python -m benchmarks.plans --out benchmarks/results/plans.json

PSNR in dB against the full sampler with the same seed, schedule and solver, on seeds not used for calibration.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor
from tqdm import tqdm

import lesa
from lesa.calibration.calibration import Calibration
from lesa.demo.model import build_pipeline, images_of, labels_of, load_pipeline, request
from lesa.evaluation.metrics import psnr
from lesa.reports.environment import describe_environment
from lesa.statistics.output_errors import OutputErrorGram

CALIBRATION = range(10_000, 10_096)
HELD_OUT = range(512)
BUDGETS = range(5, 18)
BATCH = 256

Sampler = tuple[FluxPipeline, dict[str, Any]]  # the pipeline, and the arguments of a request


def samplers() -> dict[str, Sampler]:
    """Schedules, guidance scales and solvers, all with the demo's weights."""
    base = load_pipeline()

    def with_scheduler(scheduler: Any, **options: Any) -> Sampler:
        pipeline = build_pipeline(base.transformer)
        pipeline.scheduler = scheduler
        return pipeline, options

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {
        "50 steps": (base, {}),
        "50 steps, no time shift": with_scheduler(FlowMatchEulerDiscreteScheduler()),
        "20 steps": (base, {"num_steps": 20}),
        "30 steps": (base, {"num_steps": 30}),
        "50 steps, guidance 3": (base, {"guidance": 3.0}),
        "50 steps, DPM-Solver++": with_scheduler(
            DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True, algorithm_type="dpmsolver++")
        ),
        "50 steps, UniPC": with_scheduler(UniPCMultistepScheduler(**flow)),
        "20 steps, no time shift": with_scheduler(FlowMatchEulerDiscreteScheduler(), num_steps=20),
    }


def sample(sampler: Sampler, seeds: range) -> Tensor:
    pipeline, options = sampler
    parts = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    return torch.cat([images_of(pipeline(**request(labels_of(part).tolist(), part, **options))) for part in parts])


def calibrate(sampler: Sampler, seeds: range) -> Calibration:
    pipeline, options = sampler
    call = request(labels_of(seeds).tolist(), seeds, **options)
    return lesa.calibrate(pipeline, [call], search=False, progress=False)


class Judge:
    """Measures the PSNR of forecasters and plans on one sampler."""

    def __init__(self, sampler: Sampler, seeds: range) -> None:
        self.sampler, self.seeds = sampler, seeds
        self._full = sample(sampler, seeds)

    def psnr(self, forecaster: Any, plan: lesa.StepPlan) -> float:
        with lesa.enable(self.sampler[0], forecaster, plan):
            return float(psnr(sample(self.sampler, self.seeds), self._full).mean())


def budgets(sampler: Sampler, seeds: range) -> list[dict[str, Any]]:
    """Every forecaster on the best plan of every budget, and the default on evenly spaced full steps."""
    calibration, judge = calibrate(sampler, CALIBRATION), Judge(sampler, seeds)
    (stream,) = calibration.streams
    default, gram = calibration.forecasters()[stream], calibration.streams[stream].gram
    others: dict[str, Callable[[], Any]] = {
        "reuse": lesa.Reuse,
        "Taylor 1": lambda: lesa.Taylor(1),
        "Taylor 2": lambda: lesa.Taylor(2),
        "Taylor 2 in time": lambda: lesa.Taylor(2, "time"),
        "Hermite 2": lambda: lesa.Hermite(2),
        "FoCa": lesa.FoCa,
        "least squares": lambda: lesa.LeastSquares(gram),
        "path least squares on features": lambda: lesa.PathLeastSquares(OutputErrorGram.from_gram(gram)),
        "path least squares (default)": lambda: default,
    }
    rows = []
    for budget in tqdm(BUDGETS, desc="budgets"):
        plan = calibration.plan(budget)
        even = lesa.StepPlan.even(calibration.times, budget)
        rows.append(
            {
                "full_steps": budget,
                "plan": plan.full_steps,
                "predicted_error": lesa.sample_error(calibration.errors(), plan, calibration.times),
                "psnr": {name: judge.psnr(make(), plan) for name, make in others.items()},
                "even": {"Taylor 2 in time": judge.psnr(lesa.Taylor(2, "time"), even)},
            }
        )
    return rows


def other_samplers(seeds: range) -> list[dict[str, Any]]:
    """The best plan of a calibration on each sampler, and the paper's plan with as many full steps."""
    rows = []
    for name, sampler in tqdm(samplers().items(), desc="samplers"):
        calibration, judge = calibrate(sampler, CALIBRATION[:32]), Judge(sampler, seeds)
        steps = calibration.num_steps
        for interval in (5, 7, 10) if steps == 50 else (4, 6):
            paper = lesa.StepPlan.paper(steps, interval)
            best = calibration.plan(len(paper.full_steps))
            rows.append(
                {
                    "sampler": name,
                    "full_steps": len(paper.full_steps),
                    "paper": judge.psnr(calibration.forecasters(), paper),
                    "paper, Taylor 2": judge.psnr(lesa.Taylor(2), paper),
                    "best": judge.psnr(calibration.forecasters(), best),
                    "plan": best.full_steps,
                }
            )
    return rows


def fewer_samples(sampler: Sampler, seeds: range) -> list[dict[str, Any]]:
    """The default forecaster with plan and table from few samples."""
    judge = Judge(sampler, seeds)
    rows = []
    for count in (4, 16, 96):
        start = time.perf_counter()
        calibration = calibrate(sampler, CALIBRATION[:count])
        plans = {budget: calibration.plan(budget) for budget in (13, 10, 8)}
        seconds = time.perf_counter() - start
        found = {budget: judge.psnr(calibration.forecasters(), plan) for budget, plan in plans.items()}
        rows.append({"samples": count, "psnr": found, "seconds": seconds})
    return rows


def resampled(seeds: range) -> list[dict[str, Any]]:
    """A calibration for 50 steps used for fewer steps, and a calibration for those steps."""
    pipeline = load_pipeline()
    known = calibrate((pipeline, {}), CALIBRATION[:32])
    rows = []
    for steps, budget in ((40, 8), (30, 8), (30, 6), (20, 6)):
        sampler = pipeline, {"num_steps": steps}
        judge, own = Judge(sampler, seeds), calibrate(sampler, CALIBRATION[:32])
        rows.append(
            {
                "steps": steps,
                "full_steps": budget,
                "own": judge.psnr(own.forecasters(), own.plan(budget)),
                "resampled": judge.psnr(known.forecasters(), known.plan(budget, times=own.times)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--held-out", type=int, default=len(HELD_OUT), metavar="N")
    options = parser.parse_args()
    seeds = HELD_OUT[: options.held_out]
    sampler = samplers()["50 steps"]
    result = {
        "environment": describe_environment(["torch", "diffusers"]),
        "held_out": len(seeds),
        "samples": fewer_samples(sampler, seeds),
        "samplers": other_samplers(seeds[:256]),
        "resampled": resampled(seeds[:256]),
        "budgets": budgets(sampler, seeds),
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
