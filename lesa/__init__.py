"""Learned, stage-aware feature predictors for diffusion transformers.

A forecaster turns a sampling schedule into a table of coefficients; a kernel turns the table and the kept features
into predictions; an adapter puts both into somebody's transformer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lesa.calibration.calibration import Calibration
from lesa.calibration.errors import ErrorGram
from lesa.calibration.gram import GramMatrix
from lesa.calibration.planning import optimize_plan, sample_error
from lesa.calibration.trajectories import Trajectories
from lesa.forecasters import (
    L2P,
    AdamsBashforth,
    FoCa,
    Forecaster,
    Hermite,
    LeastSquares,
    PathLeastSquares,
    Reuse,
    Taylor,
    make_forecaster,
    register_forecaster,
)
from lesa.plan import StepPlan
from lesa.predictor import LesaConfig, LesaPredictor
from lesa.runtime.guard import Guard
from lesa.runtime.history import FeatureHistory
from lesa.runtime.warning import LesaWarning
from lesa.sharing import load, push_to_hub, save
from lesa.table import CoefficientTable, unroll

if TYPE_CHECKING:
    from lesa.adapters.diffusers import disable, enable, from_taylorseer_config
    from lesa.adapters.modules import enable_module
    from lesa.adapters.official import load_official
    from lesa.calibration.calibrating import calibrate
    from lesa.calibration.collecting import collect
    from lesa.calibration.gram_training import fit_gram
    from lesa.calibration.refining import refine_plans
    from lesa.calibration.training import fit
    from lesa.evaluation.evaluate import evaluate

__version__ = "0.1.0"

__all__ = [
    "L2P",
    "AdamsBashforth",
    "Calibration",
    "CoefficientTable",
    "ErrorGram",
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
    "PathLeastSquares",
    "Reuse",
    "StepPlan",
    "Taylor",
    "Trajectories",
    "calibrate",
    "collect",
    "disable",
    "enable",
    "enable_module",
    "evaluate",
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
    "calibrate": "lesa.calibration.calibrating",
    "collect": "lesa.calibration.collecting",
    "disable": "lesa.adapters.diffusers",
    "enable": "lesa.adapters.diffusers",
    "enable_module": "lesa.adapters.modules",
    "evaluate": "lesa.evaluation.evaluate",
    "fit": "lesa.calibration.training",
    "fit_gram": "lesa.calibration.gram_training",
    "from_taylorseer_config": "lesa.adapters.diffusers",
    "load_official": "lesa.adapters.official",
    "refine_plans": "lesa.calibration.refining",
}


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(import_module(_lazy[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
