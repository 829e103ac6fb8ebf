"""``ForecasterConfig``: a forecaster as a calibrator of cache-dit."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from lesa.adapters.cache_dit.calibrator import ForecasterCalibrator
from lesa.adapters.cache_dit.compat import CalibratorConfig, install
from lesa.adapters.cache_dit.tables import Tables
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan


class ForecasterConfig(CalibratorConfig):
    """``cache_dit.enable_cache(pipe, cache_config=..., calibrator_config=ForecasterConfig(lesa.Taylor(2), pipe))``.

    cache-dit decides which steps are full, by a mask (:func:`steps_mask`) or a threshold; the forecaster predicts the
    others. What is predicted differs from ``lesa.enable``: the residual of all blocks but the first ones, or the state
    after them, for the image and the text.

    Args:
        forecaster: any with a table.
        schedule: the pipeline, whose scheduler is read when a generation begins; or the times [steps + 1]; or the
            number of steps, for a forecaster that only counts them.
        max_history: full features that a prediction may look back on; None: as many as the forecaster uses.
        enable_encoder_calibrator: also predict the text stream.
        calibrator_cache_type: what is predicted, ``"residual"`` or ``"hidden_states"``.

    Raises:
        ImportError: if cache-dit has changed so that no calibrator of others can be put into it.
        ValueError: if the forecaster needs times and there are none.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        schedule: Any | Tensor | Sequence[float] | int,
        *,
        max_history: int | None = None,
        enable_encoder_calibrator: bool = True,
        calibrator_cache_type: Literal["residual", "hidden_states"] = "residual",
    ) -> None:
        if calibrator_cache_type not in ("residual", "hidden_states"):
            raise ValueError(f"calibrator_cache_type is 'residual' or 'hidden_states', not {calibrator_cache_type!r}")
        install("lesa", ForecasterCalibrator)
        super().__init__(
            enable_calibrator=True,
            enable_encoder_calibrator=enable_encoder_calibrator,
            calibrator_type="lesa",
            calibrator_cache_type=calibrator_cache_type,
            calibrator_kwargs={"tables": Tables(forecaster, schedule, max_history)},
        )

    def strify(self, **kwargs: Any) -> str:
        """Its name in the log and summary of cache-dit."""
        return f"lesa.{self.calibrator_kwargs['tables'].forecaster!r}"


def steps_mask(plan: StepPlan) -> list[int]:
    """A plan as cache-dit's ``steps_computation_mask``; with the policy ``"static"`` it is kept exactly."""
    return [int(plan.is_full(step)) for step in range(plan.num_steps)]
