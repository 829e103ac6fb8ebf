"""cache-dit: any forecaster as a calibrator inside ``cache_dit.enable_cache``."""

from lesa.adapters.cache_dit.calibrator import ForecasterCalibrator
from lesa.adapters.cache_dit.config import ForecasterConfig, steps_mask

__all__ = ["ForecasterCalibrator", "ForecasterConfig", "steps_mask"]
