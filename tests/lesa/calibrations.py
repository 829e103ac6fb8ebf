"""Calibrations of smooth random features for tests."""

import torch

from lesa import Calibration, GramMatrix
from lesa.calibration.calibration import Measured
from lesa.statistics.output_errors import pairs
from tests.lesa.adapters.diffusers.tiny import STEPS

TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def random_gram(steps=STEPS, seed=0, samples=64, times=None):
    """A Gram matrix of smooth random features."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(1, 0, steps + 1) if times is None else times
    gram, waves = GramMatrix(steps), torch.randn(4, samples, generator=generator)
    for step, time in enumerate(times[:-1]):
        gram.update(step, sum(wave * torch.cos(2.5 * i * time + i) for i, wave in enumerate(waves, 1)))
    return gram


def products(errors):
    """The inner products of the output errors of all pairs of steps."""
    return errors.products(*pairs(errors.num_steps))


def calibration(steps=STEPS, streams=(("transformer", "cond"),), model=None, seed=0):
    """A calibration of one sample, with the same features for every stream."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Calibration(
        times, {stream: Measured(random_gram(steps, seed)) for stream in streams}, model or {}, samples=1
    )
