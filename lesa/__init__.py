"""Learned, stage-aware feature predictors for diffusion transformers.

A forecaster turns a sampling schedule into a table of coefficients; a kernel turns the table and the kept features
into predictions; an adapter attaches both to a transformer.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lesa.api.folders import load, push_to_hub, save
from lesa.calibration.calibration import Calibration, optimize_plan
from lesa.calibration.planning import sample_error
from lesa.forecasters import (
    L2P,
    FoCa,
    Forecaster,
    Hermite,
    LeastSquares,
    Multistep,
    PathLeastSquares,
    Reuse,
    Taylor,
    make_forecaster,
    register_forecaster,
)
from lesa.predictor.config import LesaConfig
from lesa.predictor.predictor import LesaPredictor
from lesa.runtime.driver import LesaWarning
from lesa.runtime.guard import Guard
from lesa.runtime.history import FeatureHistory
from lesa.statistics.gram import GramMatrix
from lesa.statistics.output_errors import OutputErrorGram
from lesa.tables.evaluation_times import evaluation_times
from lesa.tables.plan import StepPlan
from lesa.tables.substeps import Substeps
from lesa.tables.table import CoefficientTable, unroll
from lesa.training.trajectories import Trajectories

if TYPE_CHECKING:
    from lesa.adapters.any_module import enable_module
    from lesa.adapters.diffusers.taylorseer import from_taylorseer_config
    from lesa.api.enable import disable, enable
    from lesa.api.official import load_official
    from lesa.calibration.calibrate import calibrate
    from lesa.calibration.refine import refine_plans
    from lesa.evaluation.evaluate import evaluate
    from lesa.training.collect import collect
    from lesa.training.from_gram import fit_gram
    from lesa.training.two_stage import fit

__version__ = "0.1.0"

__all__ = [
    "L2P",
    "Calibration",
    "CoefficientTable",
    "FeatureHistory",
    "FoCa",
    "Forecaster",
    "GramMatrix",
    "Guard",
    "Hermite",
    "LeastSquares",
    "LesaConfig",
    "LesaPredictor",
    "LesaWarning",
    "Multistep",
    "OutputErrorGram",
    "PathLeastSquares",
    "Reuse",
    "StepPlan",
    "Substeps",
    "Taylor",
    "Trajectories",
    "calibrate",
    "collect",
    "disable",
    "enable",
    "enable_module",
    "evaluate",
    "evaluation_times",
    "fit",
    "fit_gram",
    "from_taylorseer_config",
    "load",
    "load_official",
    "make_forecaster",
    "optimize_plan",
    "push_to_hub",
    "refine_plans",
    "register_forecaster",
    "sample_error",
    "save",
    "unroll",
]

# Loaded when first asked for, since they need more than torch.
_lazy = {
    "calibrate": "lesa.calibration.calibrate",
    "collect": "lesa.training.collect",
    "disable": "lesa.api.enable",
    "enable": "lesa.api.enable",
    "enable_module": "lesa.adapters.any_module",
    "evaluate": "lesa.evaluation.evaluate",
    "fit": "lesa.training.two_stage",
    "fit_gram": "lesa.training.from_gram",
    "from_taylorseer_config": "lesa.adapters.diffusers.taylorseer",
    "load_official": "lesa.api.official",
    "refine_plans": "lesa.calibration.refine",
}


def __getattr__(name: str) -> Any:
    if name == "ErrorGram":
        warnings.warn("lesa.ErrorGram is now called OutputErrorGram", DeprecationWarning, stacklevel=2)
        return OutputErrorGram
    if name in _lazy:
        return getattr(import_module(_lazy[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
