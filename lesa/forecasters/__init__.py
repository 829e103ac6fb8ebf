"""Forecasters: each turns a plan and a schedule into a table of coefficients. One small file each."""

from lesa.forecasters.foca import FoCa
from lesa.forecasters.hermite import Hermite
from lesa.forecasters.l2p import L2P
from lesa.forecasters.least_squares import LeastSquares
from lesa.forecasters.multistep import Multistep
from lesa.forecasters.path_least_squares import PathLeastSquares
from lesa.forecasters.registry import make_forecaster, register_forecaster, registered
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.taylor import Taylor
from lesa.tables.forecaster import Forecaster

register_forecaster("reuse", Reuse)
register_forecaster("taylor", Taylor)
register_forecaster("hermite", Hermite)
register_forecaster("foca", FoCa)
register_forecaster("multistep", Multistep)
register_forecaster("l2p", L2P)
register_forecaster("least-squares", LeastSquares)
register_forecaster("path-least-squares", PathLeastSquares)

__all__ = [
    "L2P",
    "FoCa",
    "Forecaster",
    "Hermite",
    "LeastSquares",
    "Multistep",
    "PathLeastSquares",
    "Reuse",
    "Taylor",
    "make_forecaster",
    "register_forecaster",
    "registered",
]
