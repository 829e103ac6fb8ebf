"""After a calibration of the demo model: plans refined by sampling, and LESA trained in several ways.

    python -m benchmarks.refining --out benchmarks/results/refining.json

PSNR in dB against the full sampler, on seeds that were not used for calibration.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import lesa
from benchmarks.plans import CALIBRATION, HELD_OUT, Judge, Sampler, calibrate, samplers
from lesa.demo.model import labels_of, request
from lesa.demo.run import CONFIG, collect_digits
from lesa.reports.environment import describe_environment

SEEDS = HELD_OUT[:256]


def refined(sampler: Sampler, seeds: range) -> list[dict[str, Any]]:
    """The plan with the smallest predicted error, and the best of six plans on samples of 16 prompts."""
    calibration, judge = calibrate(sampler, CALIBRATION), Judge(sampler, seeds)
    pipeline, options = sampler
    call = request(labels_of(CALIBRATION[:16]).tolist(), CALIBRATION[:16], **options)
    rows = []
    for budget in tqdm((7, 9, 10, 13, 15), desc="refining"):
        first = calibration.plan(budget)
        lesa.refine_plans(pipeline, calibration, [call], [budget], progress=False)
        found = [judge.psnr(calibration.forecasters(), plan) for plan in (first, calibration.plan(budget))]
        rows.append({"full_steps": budget, "predicted_best": found[0], "refined": found[1]})
    return rows


def trained(sampler: Sampler, seeds: range) -> list[dict[str, Any]]:
    """LESA trained by the paper's two stages and from inner products, beside least squares."""
    calibration, judge = calibrate(sampler, CALIBRATION), Judge(sampler, seeds)
    trajectories, gram = collect_digits(sampler[0]), next(iter(calibration.streams.values())).gram
    rows = []
    for name, plan in (("paper N=7", lesa.StepPlan.paper(50, 7)), ("calibrated", calibration.plan(10))):
        start = time.perf_counter()
        fitted = lesa.fit_gram(calibration.errors(), plan, calibration.times, CONFIG, progress=False)
        seconds = time.perf_counter() - start
        ways = {
            "two stages": lesa.fit(trajectories, plan, CONFIG, progress=False),
            "inner products": fitted,
            "least squares": lesa.LeastSquares(gram),
            "path least squares": lesa.PathLeastSquares(calibration.errors()),
        }
        psnrs = {way: judge.psnr(forecaster, plan) for way, forecaster in ways.items()}
        rows.append({"plan": name, "full_steps": len(plan.full_steps), "psnr": psnrs, "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sampler = samplers()["50 steps"]
    result = {
        "environment": describe_environment(["torch", "diffusers"]),
        "held_out": len(SEEDS),
        "trained": trained(sampler, SEEDS),
        "refined": refined(sampler, SEEDS),
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
