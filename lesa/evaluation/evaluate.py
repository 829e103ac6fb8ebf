"""``evaluate``: compare methods with the full sampler on held-out prompts."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lesa.adapters.diffusers.recorder import Prompt, call_arguments, prompt_list
from lesa.arguments import whole
from lesa.evaluation.images import images_of
from lesa.evaluation.methods import FULL, Method
from lesa.evaluation.metrics import Metric, choose_metrics, scoring_models
from lesa.files import write_text
from lesa.reports.environment import describe_environment

EVALUATION_FILE = "evaluation.json"
Row = dict[str, Any]


@scoring_models()
def evaluate(
    pipeline: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    metrics: Sequence[str | Metric] | None = None,
    images: Callable[[Any], Tensor] = images_of,
    rounds: int = 1,
    warm_up: bool = False,
    out: str | Path | None = None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    progress: bool = True,
    **options: Any,
) -> list[Row]:
    """Quality and speed of methods on prompts that no calibration has used.

    All methods make each call in turn, so that a machine that becomes slower does so for all of them.

    Args:
        pipeline: a diffusers pipeline.
        methods: what to compare with the full sampler, which always runs first.
        prompts: one call each: a prompt, a list of prompts for a batch, or the keyword arguments of a call.
        seed: call i starts from a generator seeded with ``seed + i``, unless its arguments bring a generator.
        metrics: names from :data:`lesa.evaluation.metrics.METRICS`, or metrics of your own; None: PSNR, SSIM, and those
            whose weights are on this machine.
        images: (result of a call) -> images [N, C, H, W] or videos [N, F, C, H, W] in [0, 1].
        rounds: how often all calls are made; images of the first round are scored, all rounds are timed.
        warm_up: make each call once before it is timed, to leave out work that happens once for a schedule.
        out: a folder for ``evaluation.json``, which is written after every call.
        keep: is called with the rows so far after every call, so that an interruption loses nothing.
        progress: show a progress bar.
        options: keyword arguments for every call, such as ``num_inference_steps=50``.

    Returns:
        A row for each method, the full sampler first: ``method``, ``plan``, ``full`` (the full steps), ``full_steps``
        (how many), ``speedup_ideal`` and ``speedup_wall`` (of whole calls, median over calls and rounds), the mean of
        each metric over all images, ``kept_bytes`` of features, on a GPU ``peak_bytes``, ``seconds`` (median of a
        call), ``samples`` and ``environment``.

    Raises:
        ValueError: if there are no prompts or methods, two methods have the same name and plan, or a metric cannot be
            measured here.
    """
    prompts = prompt_list(prompts)
    whole("rounds", rounds, least=1)
    everything = [FULL, *(method for method in methods if method is not FULL)]
    if len(everything) == 1:
        raise ValueError("an evaluation needs methods to compare with the full sampler")
    if len({(method.name, method.plan) for method in everything}) < len(everything):
        raise ValueError("two methods have the same name and plan, so that their rows could not be told apart")
    chosen = choose_metrics(metrics)
    figures = {method: Measurements() for method in everything}
    environment = describe_environment()
    total = rounds * len(prompts) * len(everything)
    with tqdm(total=total, desc="evaluating", disable=not progress, delay=2) as bar:
        for number in range(rounds):
            for index, prompt in enumerate(prompts):
                reference: Tensor | None = None
                for method in everything:
                    bar.update()
                    if number > 0 and not method.timed:
                        continue
                    with method.enabled(pipeline) as handle:
                        for _ in range(1 + warm_up):
                            call = {**call_arguments(prompt, seed + index, options), **method.options}
                            output, seconds, peak = _timed(pipeline, call)
                    figures[method].add_run(seconds, peak, handle, pipeline.scheduler)
                    if number == 0:
                        made = images(output)
                        reference = made if reference is None else reference
                        figures[method].add_scores(chosen, made, reference, call)
                rows = [figures[m].row(m, figures[FULL]) | {"environment": environment} for m in everything]
                if out is not None:
                    write_text(Path(out) / EVALUATION_FILE, json.dumps(rows, indent=1) + "\n")
                keep(rows)
    return rows


@dataclass
class Measurements:
    """The measurements of one method."""

    seconds: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    full: list[int] = field(default_factory=list)
    full_steps: int = 0
    steps: int = 0
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    samples: int = 0

    def add_run(self, seconds: float, peak: int | None, handle: Any, scheduler: Any) -> None:
        """Add a call: its time, and its full steps by the records of ``handle``, or all steps without records."""
        self.seconds.append(seconds)
        self.peak_bytes = peak
        self.steps = self.full_steps = len(scheduler.timesteps)
        self.full = list(range(self.steps))
        records = getattr(handle, "records", [])
        if records:
            full, predicted = _steps_of(records)
            self.full, self.full_steps = full, len(full)
            self.steps = max(self.full_steps + predicted, self.steps if not predicted else 0)
            self.kept_bytes = sum(record.kept_bytes for record in records)

    def add_scores(self, metrics: Sequence[Metric], images: Tensor, reference: Tensor, call: dict[str, Any]) -> None:
        """Add the scores of the images of one call."""
        self.samples += len(images)
        for metric in metrics:
            if call.get("prompt") or not metric.needs_prompts:
                self.scores[metric.name] += metric.measure(images, reference, call).double().tolist()

    def row(self, method: Method, whole: "Measurements") -> Row:
        """The row of a method; ``whole``: the full sampler."""
        scores = {name: statistics.fmean(values) for name, values in self.scores.items()}
        row: Row = {
            "method": method.name,
            "plan": method.plan,
            "full": self.full,
            "full_steps": self.full_steps,
            "speedup_ideal": max(self.steps, whole.steps) / self.full_steps,
            "speedup_wall": statistics.median(a / b for a, b in zip(whole.seconds, self.seconds, strict=False)),
            # JSON has no infinity, such as the PSNR of the full sampler
            **{name: score if abs(score) < float("inf") else None for name, score in scores.items()},
            "kept_bytes": self.kept_bytes,
            "seconds": statistics.median(self.seconds),
            "samples": self.samples,
        }
        return row if self.peak_bytes is None else row | {"peak_bytes": self.peak_bytes}


def _steps_of(records: Sequence[Any]) -> tuple[list[int], int]:
    """The full steps, over all transformers, of the branch with most of them, and its number of predicted steps."""
    branches: dict[str, tuple[list[int], int]] = {}
    for record in records:
        full, predicted = branches.get(record.branch, ([], 0))
        branches[record.branch] = sorted([*full, *record.full]), predicted + len(record.predicted)
    return max(branches.values(), key=lambda steps: len(steps[0]))


def _timed(pipeline: Any, call: dict[str, Any]) -> tuple[Any, float, int | None]:
    """The output of a call, its seconds, and the peak bytes of a GPU."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    output = pipeline(**call)
    if gpu:
        torch.cuda.synchronize()
    return output, time.perf_counter() - start, torch.cuda.max_memory_allocated() if gpu else None
