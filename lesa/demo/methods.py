"""What the demo compares: each method is a name, a plan and a way to put it into the pipeline."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig

from lesa.adapters.diffusers import enable
from lesa.calibration.gram import GramMatrix
from lesa.forecasters import Forecaster, LeastSquares, Reuse, Taylor
from lesa.plan import StepPlan
from lesa.predictor import LesaPredictor

NUM_STEPS = 50
INTERVALS = (5, 7, 10)


@dataclass(frozen=True)
class Method:
    """``enabled(pipeline)`` is the method as a context manager; it yields a handle, or None."""

    name: str
    plan: str
    enabled: Callable[[FluxPipeline], AbstractContextManager[Any]]


def all_methods(predictors: dict[int, LesaPredictor], gram: GramMatrix) -> list[Method]:
    """The full sampler first, then every forecaster on the paper's plans, then diffusers' own TaylorSeer."""
    methods = [Method("full sampler", "every step", lambda _: nullcontext())]
    for interval in INTERVALS:
        forecasters: dict[str, Forecaster] = {
            "reuse": Reuse(),
            "Taylor 1": Taylor(1),
            "Taylor 2": Taylor(2),
            "LESA": predictors[interval],
            "least squares": LeastSquares(gram),
        }
        methods += [_ours(name, forecaster, interval) for name, forecaster in forecasters.items()]
    # It counts its interval from another step: 7 with 3 steps before it also makes 10 full steps of 50.
    return methods + [_taylorseer(order, interval=7) for order in (1, 2)]


def _ours(name: str, forecaster: Forecaster, interval: int) -> Method:
    plan = StepPlan.paper(NUM_STEPS, interval)
    return Method(name, f"paper N={interval}", lambda pipeline: enable(pipeline, forecaster, plan))


def _taylorseer(order: int, interval: int) -> Method:
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

    return Method(f"diffusers TaylorSeer {order}", f"its own, interval {interval}", enabled)
