"""What the demo compares: each method is a name, a plan and a way to put it into the pipeline."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig

from lesa.adapters.diffusers import enable
from lesa.calibration.calibration import Calibrated, Calibration
from lesa.calibration.gram import GramMatrix
from lesa.calibration.gram_training import fit_gram
from lesa.calibration.training import fit
from lesa.calibration.trajectories import Trajectories
from lesa.choosing import UNCALIBRATED
from lesa.forecasters import Forecaster, LeastSquares, Reuse, Taylor
from lesa.plan import StepPlan
from lesa.predictor import LesaConfig, LesaPredictor

NUM_STEPS = 50
INTERVALS = (5, 7, 10)
KAN_INTERVAL = 7  # of the predictor with latent="kan"
TAYLORSEER_INTERVAL = 7
TAYLORSEER_PLAN = f"TaylorSeer interval={TAYLORSEER_INTERVAL}"


@dataclass(frozen=True)
class Method:
    """``enabled(pipeline)`` is the method as a context manager; it yields a handle, or None."""

    name: str
    plan: str
    enabled: Callable[[FluxPipeline], AbstractContextManager[Any]]
    timed: bool = True  # else a round for its images has to do


def all_methods(
    predictors: dict[int, LesaPredictor], gram: GramMatrix, kan: LesaPredictor, best: list[Method]
) -> list[Method]:
    """The full sampler, forecasters on the paper's plans, diffusers' TaylorSeer, ours on its steps, and the best."""
    methods = [Method("full sampler", "every step", lambda _: nullcontext())]
    for interval in INTERVALS:
        forecasters: dict[str, Forecaster] = {
            "reuse": Reuse(),
            "Taylor 1": Taylor(1),
            "Taylor 2": Taylor(2),
            "LESA": predictors[interval],
            "least squares": LeastSquares(gram),
        }
        plan = StepPlan.paper(NUM_STEPS, interval)
        methods += [_ours(name, forecaster, plan, f"paper N={interval}") for name, forecaster in forecasters.items()]
        if interval == KAN_INTERVAL:
            # splines of every element: arithmetic for a GPU, on a CPU slower than the full sampler
            slow = _ours("LESA, KAN on features", kan, plan, f"paper N={interval}")
            methods.append(dataclasses.replace(slow, timed=False))
    # As many full steps, but others: the last is step 46 where the paper's is 44, which matters more than the method.
    methods += [_taylorseer(order, TAYLORSEER_INTERVAL) for order in (1, 2)]
    theirs = StepPlan(NUM_STEPS, [0, 1, 2, *range(4, NUM_STEPS, TAYLORSEER_INTERVAL)])
    methods += [
        _ours("Taylor 2", Taylor(2), theirs, TAYLORSEER_PLAN),
        _ours("LESA", predictors[TAYLORSEER_INTERVAL], theirs, TAYLORSEER_PLAN),
        _ours("least squares", LeastSquares(gram), theirs, TAYLORSEER_PLAN),
    ]
    return methods + best


def calibrated_methods(calibration: Calibration, trajectories: Trajectories, config: LesaConfig) -> list[Method]:
    """As many full steps as the paper's plans, but those that a calibration finds best, and evenly spaced ones."""
    methods = []
    (stream,) = calibration.streams
    for interval in INTERVALS:
        count = len(StepPlan.paper(NUM_STEPS, interval).full_steps)
        even, best = StepPlan.even(calibration.times, count), calibration.plan(count)
        fitted = fit_gram(calibration.errors(), best, calibration.times, config)
        methods.append(_ours("Taylor 2 in time", UNCALIBRATED, even, f"even, {count} steps"))
        called = f"calibrated, {count} steps"
        methods += [_ours("Taylor 2", Taylor(2), best, called)]
        if interval == TAYLORSEER_INTERVAL:
            trained = fit(trajectories, best, config)
            methods.append(_ours("LESA, paper's training", trained, best, called))
        methods += [
            _ours("LESA, fitted to inner products", fitted, best, called),
            _ours("least squares", LeastSquares(calibration.streams[stream].gram), best, called),
            _ours("path least squares (default)", Calibrated(calibration, stream), best, called),
        ]
    return methods


def _ours(name: str, forecaster: Forecaster, plan: StepPlan, called: str) -> Method:
    return Method(name, called, lambda pipeline: enable(pipeline, forecaster, plan))


def _taylorseer(order: int, interval: int) -> Method:
    """diffusers' own hook in its lite mode, which skips the blocks and extrapolates the output."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )

    @contextmanager
    def enabled(pipeline: FluxPipeline) -> Iterator[None]:
        pipeline.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipeline.transformer.disable_cache()

    return Method(f"diffusers TaylorSeer {order}", TAYLORSEER_PLAN, enabled)
