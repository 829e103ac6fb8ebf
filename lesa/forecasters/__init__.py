"""Forecasters: each turns a plan and a schedule into a table of coefficients. One small file each."""

from lesa.forecasters.base import Forecaster, make_forecaster, register_forecaster
from lesa.forecasters.least_squares import LeastSquares
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.taylor import Taylor

register_forecaster("reuse", Reuse)
register_forecaster("taylor", Taylor)
register_forecaster("least-squares", LeastSquares)

__all__ = ["Forecaster", "LeastSquares", "Reuse", "Taylor", "make_forecaster", "register_forecaster"]
