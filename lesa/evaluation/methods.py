"""Methods: what an evaluation compares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from lesa.adapters.diffusers.attachment import Attachment
from lesa.forecasters.base import Forecasters
from lesa.runtime.accelerator import Accelerator
from lesa.runtime.plans import Plan


@dataclass(frozen=True)
class Method:
    """A row of an evaluation.

    Attributes:
        name: of the forecaster.
        plan: of the full steps.
        enabled: the method as a context manager on a pipeline; it yields an object with the ``records`` of the latest
            generation, or None if another library's cache is used.
        options: keyword arguments of its calls, such as fewer steps of the plain sampler.
        timed: whether its speed is measured; otherwise it makes one generation, for its images.
    """

    name: str
    plan: str
    enabled: Callable[[Any], AbstractContextManager[Any]]
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    timed: bool = True


FULL = Method("full sampler", "every step", lambda _: nullcontext())


def predicted(name: str, forecaster: Forecasters, plan: Plan, called: str) -> Method:
    """A forecaster, or one for each stream, on a plan."""

    @contextmanager
    def enabled(pipeline: Any) -> Iterator[Accelerator]:
        accelerator = Accelerator(forecaster, plan)
        with Attachment(pipeline, accelerator):
            yield accelerator

    return Method(name, called, enabled)
