"""What is compared: a method is a name, a plan and a way to put it into a pipeline."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lesa.runtime.accelerator import Forecasters, Plan


@dataclass(frozen=True)
class Method:
    """A row of an evaluation.

    Attributes:
        name: of the forecaster.
        plan: of the full steps.
        enabled: the method as a context manager on a pipeline; it yields a handle, or None where another library's
            cache is at work.
        timed: whether its speed is measured; otherwise one generation, for its images, has to do.
    """

    name: str
    plan: str
    enabled: Callable[[Any], AbstractContextManager[Any]]
    timed: bool = True


FULL = Method("full sampler", "every step", lambda _: nullcontext())


def predicted(name: str, forecaster: Forecasters, plan: Plan, called: str) -> Method:
    """A forecaster, or one for each stream, on a plan."""

    def enabled(pipeline: Any) -> AbstractContextManager[Any]:
        from lesa.adapters.diffusers import enable

        return enable(pipeline, forecaster, plan)

    return Method(name, called, enabled)
