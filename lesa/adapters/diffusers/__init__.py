"""diffusers: ``enable`` puts a forecaster into a pipeline or a bare transformer, ``disable`` takes it out again."""

from lesa.adapters.diffusers.handle import Handle, disable, enable, observe

__all__ = ["Handle", "disable", "enable", "observe"]
