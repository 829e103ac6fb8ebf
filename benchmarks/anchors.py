"""What one predictor for all schedules and plans loses against one made for each, on the demo model.

    python -m benchmarks.anchors --out benchmarks/results/anchors.json

One predictor with anchors is trained on four schedules and the paper's plans N = 3 to 12 at once. In each setting it is
compared with a specialist, trained by the same function on that schedule and plan alone, and with least squares on the
specialist's features, by the PSNR of held-out digits against the full sampler. Two schedules were not trained on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor
from tqdm import tqdm

import lesa
from lesa.demo.measure import call_of
from lesa.demo.model import images_of, load_pipeline
from lesa.demo.run import CALIBRATION_SEEDS, CONFIG, HELD_OUT_SEEDS, gram_of
from lesa.environment import describe_environment
from lesa.evaluation import metrics

HELD_OUT = HELD_OUT_SEEDS[:128]
TRAINED = [(50, 1.15), (30, 1.15), (20, 1.15), (30, 0.5)]  # steps and time shift
INTERVALS = range(3, 13)
EPOCHS = (6, 6)
SETTINGS = [
    (50, 1.15, 5),
    (50, 1.15, 7),
    (50, 1.15, 10),
    (30, 1.15, 4),
    (30, 1.15, 6),
    (20, 1.15, 3),
    (20, 1.15, 5),
    (30, 0.5, 5),
    (40, 1.15, 6),
    (25, 0.8, 4),
]


def use_schedule(pipeline: FluxPipeline, shift: float) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=shift, max_shift=shift)


def collect(pipeline: FluxPipeline, steps: int, shift: float) -> lesa.Trajectories:
    use_schedule(pipeline, shift)
    return lesa.collect(pipeline, [call_of(CALIBRATION_SEEDS, steps)], progress=False)


def sample(pipeline: FluxPipeline, steps: int, shift: float) -> Tensor:
    use_schedule(pipeline, shift)
    return images_of(pipeline(**call_of(HELD_OUT, steps)))


def measure() -> list[dict[str, Any]]:
    pipeline = load_pipeline()
    schedules = dict.fromkeys([*TRAINED, *((steps, shift) for steps, shift, _ in SETTINGS)])
    recorded = {key: collect(pipeline, *key) for key in tqdm(schedules, desc="collecting", delay=2)}
    start = time.perf_counter()
    lessons = [(recorded[key], [lesa.StepPlan.paper(key[0], n) for n in INTERVALS]) for key in TRAINED]
    one_for_all = lesa.fit(lessons, None, lesa.LesaConfig(anchors=16, hidden_dim=CONFIG.hidden_dim), epochs=EPOCHS)
    seconds = time.perf_counter() - start
    full: dict[tuple[int, float], Tensor] = {}
    rows = []
    for steps, shift, interval in tqdm(SETTINGS, desc="settings", delay=2):
        key, plan = (steps, shift), lesa.StepPlan.paper(steps, interval)
        if key not in full:
            full[key] = sample(pipeline, *key)
        config = lesa.LesaConfig(steps, hidden_dim=CONFIG.hidden_dim)
        forecasters = {
            "anchors": one_for_all,
            "specialist": lesa.fit(recorded[key], plan, config, epochs=EPOCHS, progress=False),
            "least squares": lesa.LeastSquares(gram_of(recorded[key])),
            "Taylor 2": lesa.Taylor(2),
        }
        psnr = {}
        for name, forecaster in forecasters.items():
            with lesa.enable(pipeline, forecaster, plan):
                images = sample(pipeline, *key)
            psnr[name] = float(metrics.psnr(images, full[key]).mean())
        rows.append(
            {
                "steps": steps,
                "shift": shift,
                "interval": interval,
                "full_steps": len(plan.full_steps),
                "trained": key in TRAINED,
                "psnr": psnr,
                "samples": len(HELD_OUT),
                "training_seconds": seconds,
                "parameters": sum(p.numel() for p in one_for_all.parameters()),
            }
        )
        print(steps, shift, interval, {name: f"{value:.2f}" for name, value in psnr.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    environment = describe_environment(["torch", "diffusers"])
    rows = [row | {"environment": environment} for row in measure()]
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
