"""diffusers: ``enable`` puts a forecaster into a pipeline or a bare transformer, ``disable`` takes it out again."""

from lesa.adapters.diffusers.handle import Handle, disable, enable, observe
from lesa.adapters.diffusers.taylorseer import from_taylorseer_config

__all__ = ["Handle", "disable", "enable", "from_taylorseer_config", "observe"]
