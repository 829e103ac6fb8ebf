"""What a saved predictor says of itself: the content of its config.json and of its model card."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lesa.arguments import real
from lesa.files.hub import LIBRARY
from lesa.files.tensors import check_version
from lesa.predictor.config import LesaConfig
from lesa.tables.plan import StepPlan
from lesa.tables.times import as_times

VERSION = 1
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)  # what from_json raises


@dataclass(frozen=True)
class Description:
    """A predictor without its weights.

    Attributes:
        config: its shape.
        plan: the plan it was fitted for, or None.
        schedule: the times [steps + 1] it was fitted on, or None.
        losses: the loss curve of each stage of training.
    """

    config: LesaConfig
    plan: StepPlan | None
    schedule: list[float] | None
    losses: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """As :meth:`from_json` reads it."""
        return {"library": LIBRARY, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, said: Any) -> "Description":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: (or another of :data:`UNUSABLE`) if it describes no predictor, or has another version.
        """
        check_version(said.get("version"), VERSION)
        config = LesaConfig(**said["config"])
        plan, schedule = said.get("plan"), said.get("schedule")
        return cls(
            config,
            None if plan is None else StepPlan(**plan),
            None if schedule is None else as_times(schedule, config.num_steps).tolist(),
            _curves(said.get("losses")),
        )

    def differences(self, other: "Description", names: Any) -> list[str]:
        """Which of the attributes ``names`` differ between two descriptions."""
        known = [field.name for field in dataclasses.fields(self)]
        return [name for name in known if name in names and getattr(self, name) != getattr(other, name)]


def _curves(losses: Any) -> dict[str, list[float]]:
    if losses is None:
        return {}
    if not isinstance(losses, dict) or not all(isinstance(curve, list) for curve in losses.values()):
        raise ValueError("losses must have a list for each stage")
    return {stage: [real("a loss", loss) for loss in curve] for stage, curve in losses.items()}
