"""cache-dit: any forecaster as a calibrator inside ``cache_dit.enable_cache``."""

from lesa.adapters.cache_dit.calibrator import ForecasterCalibrator
from lesa.adapters.cache_dit.config import ForecasterConfig, steps_mask
from lesa.adapters.cache_dit.recorder import GramConfig

__all__ = ["ForecasterCalibrator", "ForecasterConfig", "GramConfig", "steps_mask"]
