"""``enable`` and ``disable``."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lesa.adapters.diffusers.attachment import Attachment, detach
from lesa.adapters.diffusers.euler import ChooseTimes, choose_times, reason_not_divisible
from lesa.adapters.diffusers.pipeline import describe_model
from lesa.adapters.diffusers.step_clock import make_clock
from lesa.api.choose import resolve_request
from lesa.arguments import whole
from lesa.calibration.budget import FEWEST, Budget
from lesa.calibration.calibration import Calibration
from lesa.forecasters.base import forecaster_list
from lesa.runtime.accelerator import Accelerator
from lesa.runtime.guard import Guard
from lesa.runtime.plans import Plan
from lesa.runtime.record import Record
from lesa.tables.evaluation_times import evaluation_times
from lesa.tables.forecaster import Forecaster, Stream
from lesa.tables.plan import StepPlan
from lesa.tables.substeps import Substeps
from lesa.tables.table import CoefficientTable


class Handle(Attachment):
    """An enabled forecaster. ``with lesa.enable(...) as handle:`` disables it at the end of the block.

    Args:
        target: a pipeline or a transformer.
        accelerator: the driver.
        times: of a bare transformer.
        divisible: the loop around a bare transformer is Euler's method.
        set_times: chooses the times of the pipeline's schedules; None: they stay.
    """

    def __init__(
        self,
        target: Any,
        accelerator: Accelerator,
        times: Tensor | Sequence[float] | None = None,
        *,
        divisible: bool = False,
        set_times: ChooseTimes | None = None,
    ) -> None:
        self._accelerator = accelerator
        num_steps = accelerator.plan.num_steps if isinstance(accelerator.plan, StepPlan) else None
        if num_steps is None and times is not None and isinstance(accelerator.plan, Budget):
            num_steps = len(times) - 1
        self._restore_times: Callable[[], None] = lambda: None
        super().__init__(target, accelerator, make_clock(target, times, num_steps, divisible=divisible))
        if set_times is not None:
            self._restore_times = choose_times(target.scheduler, set_times)

    def disable(self) -> None:
        """Restore the transformers and the scheduler exactly; a second call does nothing."""
        self._restore_times()
        super().disable()

    @property
    def records(self) -> list[Record]:
        """What each branch of the latest generation did: full and predicted steps, bytes kept, time of a step."""
        return self._accelerator.records

    @property
    def going_on(self) -> list[Stream]:
        """The streams whose features are kept at the moment: those of generations that are not over."""
        return self._accelerator.going_on

    @property
    def warnings(self) -> list[str]:
        """The warnings since lesa was enabled, each once."""
        return list(self._accelerator.warnings.given)

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        steps = ", ".join(
            f"{r.component} ({r.branch}): {len(r.full)} full and {len(r.predicted)} predicted" for r in self.records
        )
        return f"<lesa.Handle, {state}; {self._accelerator.forecasters!r}; {steps or 'no generation yet'}>"

    def summary(self) -> str:
        """What the latest generation did, a paragraph for each branch (steps, bytes kept, time of a step); warnings.

        Times are means without the very first step. On a GPU they are times of the device, and this waits for it.
        """
        return "\n".join(map(str, [*self.records, *self.warnings])) or "no generation yet"

    def report(self) -> dict[Stream, dict[int, float]]:
        """The relative error of predictions: for each branch of the latest generation, by full step.

        It is the error that the prediction of this step would have had: the length of the difference over the length
        of the true feature. The first step has none.

        Raises:
            ValueError: if there is no guard: ``enable(..., guard=lesa.Guard())``.
        """
        if self._accelerator.guard is None:
            raise ValueError("predictions are only compared with the truth under enable(..., guard=lesa.Guard())")
        return {(r.component, r.branch): r.monitor.errors() for r in self.records if r.monitor is not None}


def enable(
    target: Any,
    forecaster: Forecaster | CoefficientTable | Calibration | Mapping[Stream, Forecaster] | str | Path | None = None,
    plan: Plan | None = None,
    *,
    speedup: float | None = None,
    full_steps: int | None = None,
    evaluations: int | None = None,
    max_error: float | None = None,
    substeps: int | None = None,
    set_times: bool = True,
    times: Tensor | Sequence[float] | None = None,
    max_history: int | None = None,
    guard: Guard | None = None,
    strict: bool = False,
) -> Handle:
    """Predict the steps that a plan does not run.

    A step is one evaluation of a transformer for one branch; a solver of second order makes two of most intervals. The
    first step of each transformer and branch is full. If it is not the first of the schedule (image to image,
    inpainting, the second transformer of Wan 2.2, guidance that begins late), a fixed plan is used from there on with
    that step made full, and a function is called with the remaining times.

    Args:
        target: a diffusers pipeline, whose transformers all take part, or a bare transformer.
        forecaster: a :class:`Calibration`; one forecaster for all, or one for each (component, branch), such as
            ``("transformer", "cond")``; or the folder or repository of the Hugging Face Hub that holds them, which
            :func:`lesa.load` reads. None: nothing is calibrated, and a Taylor expansion in time is used.
        plan: which steps are full: fixed, or a function of the generation's times [steps + 1] float64 that returns
            one. None: the plan of the forecaster, if it has one: that of a :class:`CoefficientTable`, or the one that a
            predictor was fitted for.
        speedup, full_steps, max_error: a budget in place of a plan: at least so many times fewer full steps, exactly
            so many, or as few as keep a predicted error (:meth:`Calibration.plan`). A calibration has the best plan
            for it; without one, full steps are evenly spaced in noise level. A budget is a wish: a schedule that is too
            short for it gets the full steps that it needs, at least two, and the record says so.
        evaluations: a budget for samples that are near the exact solution, whatever the number of steps: at least so
            many evaluations, and between two of them the output is predicted at times finer than the schedule
            (``substeps``). Sample with as many steps as evaluations, ``pipe(..., num_inference_steps=10)``, or with
            more, of which the others are predicted. docs/evaluations.md says how near they come.
        substeps: into how many parts each step is divided. What the model returns is the mean output over the step, the
            true one at its beginning and predicted ones at the others. None: with ``evaluations``, 200 in all, spread
            over the steps by their lengths; otherwise none. A scheduler whose steps cannot be divided (anything but
            Euler's method for flow matching without noise) gets plain outputs, so that only ``num_inference_steps``
            makes the schedule finer.
        set_times: with ``evaluations``, a schedule of at most as many steps gets the best times for them, those of the
            calibration if there is one; not if the call chose its times, by ``sigmas=``. The scheduler is restored with
            the model.
        times: for a bare transformer, the noise levels of its schedule, such as ``scheduler.sigmas``. A pipeline's come
            from its scheduler.
        max_history: full features that a prediction may use. Each costs the memory of one feature; a folded LESA table
            uses all of the plan's. :meth:`CoefficientTable.limited` says what happens to the others.
        guard: compares predictions with the truth at every full step, for ``handle.report()``, and may spend extra full
            steps. It costs one pass over the kept features at each full step.
        strict: a generation that predicts nothing although its plan has predicted steps raises a RuntimeError at its
            end; otherwise it gives a :class:`LesaWarning`.

    Returns:
        A handle, which is a context manager.

    Raises:
        ValueError: if the target cannot be accelerated or the arguments do not fit; the target is unchanged then.
    """
    model = describe_model(target)
    forecasters, plan = resolve_request(
        forecaster, plan, full_steps=full_steps, speedup=speedup, evaluations=evaluations, max_error=max_error
    )
    if substeps is not None:
        whole("substeps", substeps, least=1)
        _check_divisible(target, times)
    divided = substeps is not None or evaluations is not None
    divide = functools.partial(Substeps.divide, substeps=substeps) if divided else None
    choose = None
    if evaluations is not None and set_times and hasattr(target, "scheduler"):
        choose = _times_for(evaluations, plan) if not reason_not_divisible(target.scheduler) else None
    for each in forecaster_list(forecasters):
        each.check_model(model)
        if isinstance(plan, StepPlan):
            each.check_plan(plan)
    if max_history is not None:
        whole("max_history", max_history, least=1)
    if guard is not None and not isinstance(guard, Guard):
        raise ValueError(f"guard must be a lesa.Guard, not {guard!r:.80}")
    accelerator = Accelerator(forecasters, plan, max_history, guard, strict=strict, substeps=divide)
    return Handle(target, accelerator, times, divisible=divided and times is not None, set_times=choose)


def _check_divisible(target: Any, times: Any) -> None:
    """Raise a ValueError if substeps were asked for and the steps of the target cannot be divided."""
    if isinstance(target, nn.Module):
        if times is None:
            raise ValueError("substeps= of a bare transformer needs times=, the noise levels of its schedule")
        return
    reason = reason_not_divisible(target.scheduler)
    if reason:
        raise ValueError(f"the steps of this pipeline cannot be divided into substeps: {reason}; sample in more steps")


def _times_for(evaluations: int, plan: Plan) -> ChooseTimes:
    """The best times for schedules of at most so many steps; longer ones keep their own."""
    calibration = plan.calibration if isinstance(plan, Budget) else None

    def choose(schedule: Tensor) -> Tensor:
        steps = len(schedule) - 1
        if steps > evaluations:
            return schedule
        if calibration is not None and FEWEST <= steps < len(calibration.times) - 1:
            return calibration.evaluation_times(steps)
        return evaluation_times(schedule, steps)

    return choose


def disable(target: Any) -> None:
    """Take lesa out of a pipeline or transformer; nothing happens if it is not enabled."""
    detach(target)
