"""Our forecasters and other caches with the same plan, each as a context manager around a denoising loop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import lesa
from benchmarks.architectures import Loop
from benchmarks.problems.interval import ClosedLoop
from lesa import LesaConfig, LesaPredictor, StepPlan, Taylor
from lesa.runtime.driver import Driver

INTERVAL = 7
FULL_SAMPLER = "full sampler"


class StepByStep(Driver):
    """The released predictor as a driver: eager operators on a window of features and predictions."""

    def __init__(self, predictor: LesaPredictor, plan: StepPlan) -> None:
        self.predictor, self.plan = predictor, plan
        self.window: list[Tensor] = []
        self.step, self.loop = 0, None

    def begin(self, call: Any) -> bool:
        self.step = call.step
        if call.step == 0:
            self.window, self.times = [], call.times
        return not self.plan.is_full(call.step)

    def keep(self, head: str, feature: Tensor) -> None:
        if self.loop is None:
            self.loop = ClosedLoop(self.predictor, self.times, feature.device.type, feature.dtype)
        self._append(feature.clone())

    def predict(self, head: str) -> Tensor:
        assert self.loop is not None, "the first step is full"
        self._append(self.loop(self.window, self.step))
        return self.window[-1]

    def _append(self, feature: Tensor) -> None:
        self.window = [*self.window, feature][-self.predictor.config.history :]

    def reset(self, session: object = None) -> None:
        self.window = []


def methods(loop: Loop) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """The methods by name; each is enabled while its context is active."""
    torch.manual_seed(0)
    predictor = LesaPredictor(LesaConfig(loop.steps, hidden_dim=256)).requires_grad_(False)
    plan = StepPlan.paper(loop.steps, INTERVAL)
    return {
        FULL_SAMPLER: nullcontext,
        "LESA": lambda: lesa.enable(loop, predictor, plan),
        "Taylor 2": lambda: lesa.enable(loop, Taylor(2), plan),
        "step-by-step eager predictor": lambda: _step_by_step(loop, predictor, plan),
        "diffusers TaylorSeer (lite)": lambda: _taylorseer(loop),
        "cache-dit": lambda: _cache_dit(loop, plan),
    }


def _step_by_step(loop: Loop, predictor: LesaPredictor, plan: StepPlan) -> AbstractContextManager[Any]:
    from lesa.adapters.diffusers import Attachment

    return Attachment(loop, StepByStep(predictor, plan))


@contextmanager
def _taylorseer(loop: Loop) -> Iterator[None]:
    from diffusers import TaylorSeerCacheConfig

    transformer: Any = loop.transformer
    transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=INTERVAL,
            disable_cache_before_step=3,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
    )
    try:
        yield
    finally:
        transformer.disable_cache()


@contextmanager
def _cache_dit(loop: Loop, plan: StepPlan) -> Iterator[None]:
    """cache-dit: the first block always runs, as it requires, the others by a mask."""
    import cache_dit
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline

    cache_dit.enable_cache(
        loop.transformer,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=3,
            num_inference_steps=loop.steps,
            steps_computation_mask=[int(plan.is_full(step)) for step in range(loop.steps)],
            steps_computation_policy="static",
            enable_separate_cfg=False,
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(loop.transformer)
        if hasattr(FakeDiffusionPipeline, "_is_cached"):  # cache-dit sets it on the class and does not remove it
            del FakeDiffusionPipeline._is_cached
