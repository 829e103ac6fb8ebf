"""Drives one tiny transformer step by step, without lesa, with lesa or with another cache, and compares the outputs."""

from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from lesa import StepPlan
from lesa.runtime.driver import Call, Driver
from tests.lesa.adapters.diffusers.models.row import Row, build

STEPS = 6
PLAN = StepPlan(STEPS, [0, 1, 3])
BRANCHES = ("cond", "uncond")
Outputs = dict[tuple[int, str], list[Tensor]]  # by step and branch


class Loop:
    """A denoising loop with the attributes of a pipeline that the adapter reads, and two branches of guidance.

    The branches are named if the class has a cache context, and known by the order of calls otherwise.
    """

    def __init__(self, name: str, row: Row) -> None:
        torch.manual_seed(0)
        self.row = row
        self.transformer = build(name, row)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, *, constant: bool = False, each: Callable[[int, str], None] = lambda step, branch: None
    ) -> Outputs:
        """A generation. ``constant``: the inputs are equal at every step; ``each`` is called after every call."""
        self.scheduler.set_timesteps(STEPS)
        self.scheduler.set_begin_index(0)  # as pipelines do that start at the first step
        options = (
            {"return_dict": False} if "return_dict" in signature(type(self.transformer).forward).parameters else {}
        )
        context = getattr(self.transformer, "cache_context", lambda branch: nullcontext())
        outputs = {}
        for step, t in enumerate(self.scheduler.timesteps):
            for number, branch in enumerate(BRANCHES):
                torch.manual_seed(1 + number)  # conditions stay the same, only the time changes
                inputs = self.row.inputs(0.5 if constant else float(t) / 1000)
                with context(branch):
                    outputs[step, branch] = tensors(self.transformer(**inputs, **options))
                each(step, branch)
            self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        reset = getattr(self.transformer, "_reset_stateful_cache", None)
        if reset is not None:
            reset()  # as pipelines do at their end
        return outputs


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors(part)] if isinstance(output, tuple | list) else []


def equal(a: Outputs, b: Outputs) -> bool:
    """Whether all outputs are equal bit for bit."""
    return a.keys() == b.keys() and all(
        len(a[k]) == len(b[k]) and all(torch.equal(x, y) for x, y in zip(a[k], b[k], strict=True)) for k in a
    )


def error(a: Outputs, b: Outputs) -> float:
    """The largest relative difference of any output of any call."""
    return max(
        float((x - y).norm() / y.norm().clamp_min(1e-12)) if bool(x.isfinite().all()) else float("inf")
        for k in a
        for x, y in zip(a[k], b[k], strict=True)
    )


class BlockRuns:
    """Counts forwards of anything inside blocks, independently of how the adapter finds them."""

    def __init__(self, transformer: nn.Module, embedders: tuple[str, ...]) -> None:
        self.count = 0
        self.stored: dict[tuple[int, str], int] = {}
        for name, module in transformer.named_modules():
            if _is_inside_a_list(transformer, name) and not name.startswith(embedders or ("-",)):
                module.register_forward_pre_hook(self._tick)

    def _tick(self, *_: object) -> None:
        self.count += 1

    def store(self, step: int, branch: str) -> None:
        """Store the count of a call and start again at 0."""
        self.stored[step, branch], self.count = self.count, 0


def _is_inside_a_list(transformer: nn.Module, name: str) -> bool:
    """Whether a module is inside an element of a list, at the top of the transformer or of a dictionary there."""
    path = name.split(".")
    for depth in (1, 2):
        owner = transformer.get_submodule(".".join(path[:depth])) if len(path) > depth + 1 else None
        if isinstance(owner, nn.ModuleList):
            return True
        if not isinstance(owner, nn.ModuleDict):
            return False
    return False


class Recorder(Driver):
    """Runs every step in full and records its features, by branch, step and head."""

    def __init__(self) -> None:
        self.features: dict[tuple[str, int, str], Tensor] = {}
        self._call: Call | None = None

    def begin(self, call: Call) -> bool:
        self._call = call
        return False

    def keep(self, head: str, feature: Tensor) -> None:
        assert self._call is not None
        key = (self._call.branch, self._call.step, head)
        assert key not in self.features, f"{head} is entered twice in one call"
        self.features[key] = feature.clone()

    def end(self, *, failed: bool) -> None:
        assert not failed


class Oracle(Recorder):
    """Runs the full steps of a plan and predicts the others with recorded features."""

    def __init__(self, plan: StepPlan, features: dict[tuple[str, int, str], Tensor]) -> None:
        super().__init__()
        self.plan, self.features = plan, features

    def begin(self, call: Call) -> bool:
        self._call = call
        return not self.plan.is_full(call.step)

    def keep(self, head: str, feature: Tensor) -> None:
        pass

    def predict(self, head: str) -> Tensor:
        assert self._call is not None
        return self.features[self._call.branch, self._call.step, head].clone()
