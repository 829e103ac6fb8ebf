"""``enable`` and ``disable``."""

from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lesa.adapters.diffusers.attachment import Attachment
from lesa.adapters.diffusers.clock import Clock, SchedulerClock, TimestepClock
from lesa.adapters.diffusers.compat import unwrap_module
from lesa.arguments import whole
from lesa.calibration.calibrating import describe_model
from lesa.calibration.calibration import Calibrated, Calibration
from lesa.choosing import choose, each
from lesa.plan import StepPlan
from lesa.runtime.accelerator import Accelerator, Forecasters, Plan
from lesa.runtime.driver import Driver, Stream
from lesa.runtime.guard import Guard
from lesa.schedule import as_times
from lesa.table import CoefficientTable

# The attribute of a transformer, and of its pipeline, that holds what is on it. Nothing else does, so that a pipeline
# that is dropped takes all with it.
MARK = "_lesa_observation"


class Observation:
    """A driver on every transformer of a pipeline. A context manager that takes it off at its end.

    Raises:
        ValueError: if one of the transformers cannot be driven or is driven already; nothing is changed then.
    """

    def __init__(self, target: Any, clock: Clock, driver: Driver) -> None:
        transformers = find_transformers(target)
        self._driver = driver
        self._clock = clock
        self._lock = RLock()
        self._attachments: list[Attachment] = []
        self._marked: list[Any] = []
        modules = [unwrap_module(transformer) for transformer in transformers.values()]
        taken = [name for name, module in zip(transformers, modules, strict=True) if MARK in vars(module)]
        if taken:
            raise ValueError(f"lesa is already enabled on {', '.join(taken)}; call lesa.disable(...) first")
        try:
            for component, transformer in transformers.items():
                self._attachments.append(Attachment(transformer, component, clock, driver, self._lock))
        except BaseException:
            self.disable()
            raise
        self._marked = [*modules, target]
        for marked in self._marked:
            vars(marked)[MARK] = self

    def disable(self) -> None:
        """Restore the transformers exactly; a second time does nothing."""
        with self._lock:
            while self._attachments:
                self._attachments.pop().remove()
            self._clock.close()
            while self._marked:
                marked = vars(self._marked.pop())
                if marked.get(MARK) is self:
                    del marked[MARK]
            self._driver.reset()

    def reset(self) -> None:
        """Forget all kept features, as at the end of a generation."""
        with self._lock:
            self._driver.reset()

    def __enter__(self) -> "Observation":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._driver.end(failed=True)  # nothing is said of what an exception cut short
        self.disable()


class Handle(Observation):
    """An enabled forecaster. ``with lesa.enable(...) as handle:`` disables it at the end of the block.

    Attributes:
        records: for each branch of the latest generation the steps that were full and predicted, the bytes kept and
            the time that steps took.
    """

    def __init__(self, target: Any, clock: Clock, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        super().__init__(target, clock, accelerator)

    @property
    def records(self) -> list[Any]:
        return self._accelerator.records

    @property
    def warnings(self) -> list[str]:
        """What was warned of since lesa was enabled, each thing once."""
        return list(self._accelerator.warnings.said)

    def __repr__(self) -> str:
        state = "enabled" if self._attachments else "disabled"
        steps = ", ".join(
            f"{r.component} ({r.branch}): {len(r.full)} full and {len(r.predicted)} predicted" for r in self.records
        )
        return f"<lesa.Handle, {state}; {self._accelerator.forecasters!r}; {steps or 'no generation yet'}>"

    def summary(self) -> str:
        """What the latest generation did, a paragraph for each branch: steps, features kept, the time of a step.

        Times are means without the very first step; on a GPU they are its own, and asking waits for it. What was warned
        of follows.
        """
        return "\n".join(map(str, [*self.records, *self.warnings])) or "no generation yet"

    def report(self) -> dict[Stream, dict[int, float]]:
        """How good predictions were: for each branch of the latest generation the relative error by full step.

        It is the error of what would have been predicted of that step, had it not been full: the length of the
        difference over the length of the true feature. The first step has none.

        Raises:
            ValueError: if nobody compared them: ``enable(..., guard=lesa.Guard())`` does.
        """
        if self._accelerator.guard is None:
            raise ValueError("predictions are only compared with the truth under enable(..., guard=lesa.Guard())")
        return {(r.component, r.branch): r.watch.errors() for r in self.records if r.watch is not None}

    def __enter__(self) -> "Handle":
        return self


def enable(
    target: Any,
    forecaster: Forecasters | Calibration | str | Path | None = None,
    plan: Plan | None = None,
    *,
    speedup: float | None = None,
    full_steps: int | None = None,
    max_error: float | None = None,
    times: Tensor | Sequence[float] | None = None,
    max_history: int | None = None,
    guard: Guard | None = None,
    strict: bool = False,
) -> Handle:
    """Predict the steps that a plan does not run.

    A step is one evaluation of a transformer for one branch; a solver of second order makes two of most intervals. The
    first step of each transformer and branch is full. Where it is not the first of the schedule (image to image,
    inpainting, the second transformer of Wan 2.2, guidance that begins late), a fixed plan is used from there on with
    that step made full, and a function is asked with the remaining times.

    Args:
        target: a diffusers pipeline, whose transformers all take part, or a bare transformer.
        forecaster: a :class:`Calibration`; one forecaster for all, or one for each (component, branch), such as
            ``("transformer", "cond")``; or the folder or repository of the Hugging Face Hub that holds them, which
            :func:`lesa.load` reads. None: nothing is calibrated, and a Taylor expansion in time has to do.
        plan: which steps are full: fixed, or a function of the generation's times [steps + 1] float64 that returns
            one. A :class:`CoefficientTable` brings its own; None: of a fitted predictor the one it was fitted for.
        speedup, full_steps, max_error: in place of a plan, a budget: at least so many times fewer full steps, exactly
            so many, or as few as keep a predicted error (:meth:`Calibration.plan`). A calibration has the best plan
            for it; without one, full steps are evenly spaced in noise level. It is a wish: a schedule that is too short
            for it gets the full steps that it needs, at least two, and the record says so.
        times: for a bare transformer, the noise levels of its schedule, such as ``scheduler.sigmas``. A pipeline's come
            from its scheduler.
        max_history: full features that a prediction may look back on. Each costs the memory of one feature: a folded
            LESA table wants all of the plan's. :meth:`CoefficientTable.limited` says what becomes of the others.
        guard: compares predictions with the truth at every full step, for ``handle.report()``, and may spend extra full
            steps; costs a pass over the kept features at each full step. None: costs nothing.
        strict: a generation that predicts nothing although its plan has predicted steps is a RuntimeError, at its end;
            otherwise it is a :class:`LesaWarning`.

    Returns:
        A handle, which is a context manager.

    Raises:
        ValueError: if the target cannot be accelerated or the arguments do not fit; the target is unchanged then.
    """
    model = describe_model(find_transformers(target))
    forecasters, plan = choose(forecaster, plan, full_steps=full_steps, speedup=speedup, max_error=max_error)
    for one in each(forecasters):
        if isinstance(one, Calibrated):
            one.calibration.check_model(model)
    if isinstance(plan, StepPlan):
        _rehearse(forecasters, plan)
    if max_history is not None:
        whole("max_history", max_history, least=1)
    if guard is not None and not isinstance(guard, Guard):
        raise ValueError(f"guard must be a lesa.Guard, not {guard!r:.80}")
    accelerator = Accelerator(forecasters, plan, max_history, guard, strict=strict)
    return Handle(target, make_clock(target, times, plan), accelerator)


def disable(target: Any) -> None:
    """Take lesa out of a pipeline or transformer; nothing happens if it is not there."""
    # a pipeline may have other transformers by now than those that lesa was enabled on
    for marked in (*map(unwrap_module, find_transformers(target).values()), target):
        observation = vars(marked).get(MARK)
        if observation is not None:
            observation.disable()


def observe(target: Any, driver: Driver) -> Observation:
    """Put any driver into all transformers of a pipeline, such as one that only watches."""
    return Observation(target, make_clock(target, None, None), driver)


def find_transformers(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or the bare one as ``"transformer"``.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(target, nn.Module):
        return {"transformer": target}
    components = getattr(target, "components", {})
    found = {
        name: module
        for name, module in components.items()
        if name.startswith("transformer") and isinstance(module, nn.Module)
    }
    if not found:
        raise ValueError(f"{type(target).__name__} has no transformer; give a diffusers pipeline or a transformer")
    return found


def make_clock(target: Any, times: Tensor | Sequence[float] | None, plan: Plan | None) -> Clock:
    """The scheduler of a pipeline, or the times of a bare transformer."""
    if not isinstance(target, nn.Module):
        if times is not None:
            raise ValueError("a pipeline takes its times from its scheduler; times= is for a bare transformer")
        if not hasattr(target, "scheduler"):
            raise ValueError(f"{type(target).__name__} has no scheduler; enable its transformer alone with times=...")
        return SchedulerClock(target)
    if times is None:
        return TimestepClock(None)
    if not isinstance(plan, StepPlan):
        raise ValueError("a bare transformer needs a fixed plan")
    return TimestepClock(as_times(times, plan.num_steps))


def _rehearse(forecasters: Forecasters, plan: StepPlan) -> None:
    """Complain before the first step about what is wrong already: a fixed table or size for another plan."""
    for forecaster in each(forecasters):
        if isinstance(forecaster, CoefficientTable):
            forecaster.table(plan, forecaster.times)
        steps = getattr(getattr(forecaster, "config", None), "num_steps", plan.num_steps)
        own = getattr(forecaster, "plan", None)
        if own is not None and steps is not None and steps < own.num_steps == plan.num_steps:
            continue  # fitted on a stream that takes part in some steps of the plan
        if steps not in (None, plan.num_steps):  # None: one that serves any number
            raise ValueError(
                f"the forecaster was made for {steps} steps, the plan has {plan.num_steps}; give a plan for {steps} "
                f"steps and sample with num_inference_steps={steps}, or fit one for {plan.num_steps} steps"
            )
