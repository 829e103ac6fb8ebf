"""FoCa: the feature as the solution of an ODE, forecast by BDF2 and calibrated by Heun's rule.

Source: Zheng et al., "Forecast then Calibrate", https://arxiv.org/abs/2508.16211, equations 6 to 8. Over the full
steps ..., k - 1, k and a predicted step h after k,

    slope(k)    = (3 F(k) - 4 F(k - 1) + F(k - 2)) / 2 interval        BDF2
    forecast    = 4/3 F(k) - 1/3 F(k - 1) + 2/3 h slope(k)
    calibrated  = F(k) + h/2 (slope(k - 1) + slope(forecast))

The forecast is BDF2 solved for a step whose slope is that of k, so BDF2 at the forecast gives slope(k) back, and the
calibrated feature is F(k) + h/2 (slope(k - 1) + slope(k)). On uneven intervals BDF2 is the slope, at the last feature,
of a parabola through three. The paper does not say whether k counts full steps or all steps; with all steps it is worse
than reuse on the demo's features with interval 7.
"""

from dataclasses import dataclass

from torch import Tensor

from lesa.forecasters.differences import last_full
from lesa.tables.forecaster import Forecaster
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable, unroll


@dataclass(frozen=True)
class FoCa(Forecaster):
    """FoCa, which has no parameters. With two full features it is their line, with one it is reuse."""

    needs_times = False
    reach = 4

    def table(self, plan: StepPlan, times: Tensor) -> CoefficientTable:
        full = plan.full_steps

        def chord(k: int, rows: list[Tensor]) -> Tensor:
            return (rows[full[k]] - rows[full[k - 1]]) / (full[k] - full[k - 1])

        def slope(k: int, rows: list[Tensor]) -> Tensor:
            """The slope at the k-th full step: BDF2, or the chord of the first two."""
            if k < 2:
                return chord(1, rows)
            curvature = (chord(k, rows) - chord(k - 1, rows)) / (full[k] - full[k - 2])
            return chord(k, rows) + curvature * (full[k] - full[k - 1])

        def rule(step: int, rows: list[Tensor]) -> Tensor:
            k = full.index(last_full(plan, step))
            if k == 0:
                return rows[full[0]]
            return rows[full[k]] + (step - full[k]) / 2 * (slope(k - 1, rows) + slope(k, rows))

        return unroll(plan, times, rule)
