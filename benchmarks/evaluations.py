"""How near a number of evaluations comes to the exact solution: samplers, caches, and steps divided into substeps.

    python -m benchmarks.evaluations --out benchmarks/results/evaluations_digits.json
    python -m benchmarks.evaluations --pictures DIR --seeds 16 --out benchmarks/results/evaluations_pictures.json

PSNR in dB, mean over held-out seeds, against the same model in 400 Euler steps (exact) and in 50 (what caches imitate).
With guidance every evaluation has two branches. ``--pictures`` takes what ``benchmarks.pictures.training`` wrote.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

import lesa
from benchmarks.pictures.model import Pictures
from benchmarks.pictures.model import images_of as picture_images
from lesa.calibration.calibration import Calibration
from lesa.demo.model import images_of as digit_images
from lesa.demo.model import labels_of, load_pipeline, request
from lesa.evaluation.metrics import psnr
from lesa.files import write_text
from lesa.reports.environment import describe_environment

EVALUATIONS = (6, 8, 10, 13, 20)
EXACT, IMITATED = 400, 50
FINE = 200  # steps of the calibration
CALIBRATION = range(50_000, 50_008)
TIMED = 10
BATCHES = (1, 64)

Request = Callable[..., dict[str, Any]]  # (seeds, num_steps=, guidance=) -> arguments of a call


class Heun(FlowMatchHeunDiscreteScheduler):
    """With the arguments that FluxPipeline gives."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        """As many steps as there are sigmas; the shift is fixed."""
        super().set_timesteps(len(sigmas), device)


class Subject:
    """A model, and the calls that draw a picture for each seed."""

    def __init__(self, pictures: Path | None) -> None:
        if pictures is None:
            self.name, self.pipeline, self.images = "digits", load_pipeline(), digit_images
            self.request: Request = lambda seeds, **options: request(labels_of(seeds).tolist(), seeds, **options)
        else:
            model = Pictures(pictures)
            self.name, self.pipeline, self.images, self.request = (
                "pictures",
                model.pipeline,
                picture_images,
                model.request,
            )
        self._scheduler = self.pipeline.scheduler

    def sample(self, seeds: range, steps: int, guidance: float, solver: Any = None) -> Tensor:
        """The images of a call, with another solver than Euler's if one is given."""
        self.pipeline.scheduler = solver or self._scheduler
        made: Tensor = self.images(self.pipeline(**self.request(seeds, num_steps=steps, guidance=guidance)))
        self.pipeline.scheduler = self._scheduler
        return made

    def calibrate(self, steps: int, guidance: float) -> Calibration:
        """A calibration on eight samples of a schedule with so many steps."""
        call = self.request(CALIBRATION, num_steps=steps, guidance=guidance)
        return lesa.calibrate(self.pipeline, [call], search=False, progress=False)


def measure(subject: Subject, seeds: range, guidance: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """One row for each method and number of evaluations, as soon as it is known."""
    exact, imitated = (subject.sample(seeds, steps, guidance) for steps in (EXACT, IMITATED))

    def row(method: str, evaluations: int, images: Tensor, **more: Any) -> None:
        keep(
            {
                "model": subject.name,
                "guidance": guidance,
                "method": method,
                "evaluations": evaluations,
                "psnr_exact": float(psnr(images, exact).mean()),
                f"psnr_{IMITATED}": None if images is imitated else float(psnr(images, imitated).mean()),
                "samples": len(seeds),
                **more,
            }
        )

    row("plain sampler", IMITATED, imitated)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    solvers = {
        "plain sampler": (None, 1),
        "DPM-Solver++": (DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True), 1),
        "UniPC": (UniPCMultistepScheduler(**flow), 1),
        "Heun": (Heun(shift=3.16), 2),  # exp(1.15), the time shift of both models
    }
    started = time.monotonic()
    fine, coarse = (subject.calibrate(steps, guidance) for steps in (FINE, IMITATED))
    calibrated = time.monotonic() - started
    for count in tqdm(EVALUATIONS, desc=f"{subject.name}, guidance {guidance:g}"):
        for name, (solver, order) in solvers.items():
            steps = count if order == 1 else (count + 1) // 2  # the last of Heun's steps has one evaluation
            row(name, count if order == 1 else 2 * steps - 1, subject.sample(seeds, steps, guidance, solver))
        methods: dict[str, tuple[int, Any, dict[str, int]]] = {
            "50 steps, calibrated": (IMITATED, coarse, {"full_steps": count}),
            "substeps": (count, None, {"evaluations": count}),
            "substeps, calibrated": (count, fine, {"evaluations": count}),
        }
        for name, (steps, forecaster, budget) in methods.items():
            with lesa.enable(subject.pipeline, forecaster, **budget) as handle:
                images = subject.sample(seeds, steps, guidance)
                kept = sum(record.kept_bytes for record in handle.records)
            row(name, count, images, kept_bytes=kept, calibration_seconds=calibrated if "calibrated" in name else None)


def timing(subject: Subject, rounds: int) -> list[dict[str, Any]]:
    """The time of ten evaluations with 200 substeps, relative to ten plain steps: interleaved rounds, medians.

    Time of the processor, which other programs on the machine change less than that of the clock.
    """
    rows = []
    calibration = subject.calibrate(FINE, 1.0) if rounds else None
    methods = {"nothing calibrated": None, "calibrated": calibration}
    for batch in BATCHES if rounds else ():
        plain: list[float] = []
        divided: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds):
            plain.append(_seconds(subject, batch))
            for name, forecaster in methods.items():
                with lesa.enable(subject.pipeline, forecaster, evaluations=TIMED):
                    _seconds(subject, batch)  # tables and buffers are made in the first generation
                    divided[name].append(_seconds(subject, batch))
        for name, times in divided.items():
            ratio = median(b / a for a, b in zip(plain, times, strict=True))
            row = {"model": subject.name, "batch": batch, "method": name, "ratio": ratio}
            rows.append(row | {"plain_s": median(plain), "substeps_s": median(times)})
    return rows


def _seconds(subject: Subject, batch: int) -> float:
    """The processor's time for one call of ten steps."""
    started = time.process_time()
    subject.sample(range(batch), TIMED, 1.0)
    return time.process_time() - started


def main() -> None:
    """Measure and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", type=Path, help="folder of the trained picture model; otherwise the demo's digits"
    )
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    subject = Subject(options.pictures)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "rows": [],
        "timing": timing(subject, options.rounds),
    }

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        write_text(options.out, json.dumps(result, indent=1) + "\n")

    for guidance in options.guidance:
        measure(subject, range(options.seeds), guidance, keep)


if __name__ == "__main__":
    main()
