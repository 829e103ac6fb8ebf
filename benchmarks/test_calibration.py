"""Work that is done once per model or schedule: Gram matrices, tables, and a short training."""

import functools

import pytest
import torch

import lesa
from benchmarks.conftest import time_call
from lesa import GramMatrix, LeastSquares, LesaConfig, LesaPredictor, StepPlan, Taylor, Trajectories

STEPS, SHAPE = 50, (4, 64, 96)
PLAN = StepPlan.paper(STEPS, 7)
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


@functools.cache
def features() -> torch.Tensor:
    """[steps, *feature]: every element follows a different smooth curve, so that prediction is possible."""
    a, b, c = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    return torch.stack([a + b * t.cos() + c * t.sin() for t in 3 * TIMES[:-1].float()])


def gram() -> GramMatrix:
    matrix = GramMatrix(STEPS)
    for step, feature in enumerate(features()):
        matrix.update(step, feature)
    return matrix


def test_the_gram_matrix_of_a_generation(benchmark, clock):
    flat = features().flatten(1).double()
    torch.testing.assert_close(gram().matrix[:-1, :-1], flat @ flat.T, rtol=1e-9, atol=1e-6)
    time_call(benchmark, gram, clock, "calibration/Gram matrix/50 steps")


FORECASTERS = {
    "Taylor 2": lambda: Taylor(2),
    "least squares": lambda: LeastSquares(gram()),
    "LESA": lambda: LesaPredictor(LesaConfig(STEPS)),
}


@pytest.mark.parametrize("provider", FORECASTERS)
def test_a_table(benchmark, clock, provider):
    forecaster = FORECASTERS[provider]()
    table = forecaster.table(PLAN, TIMES)
    assert table.coefficients.shape == (len(PLAN.predicted_steps), len(PLAN.full_steps))
    time_call(benchmark, lambda: forecaster.table(PLAN, TIMES), clock, "calibration/table/50 steps")


def test_a_training_of_both_stages(benchmark, clock):
    samples = features().transpose(0, 1).contiguous()
    trajectories = Trajectories(TIMES, [{("transformer", "cond"): samples}])
    config = LesaConfig(STEPS, hidden_dim=16)

    last = {step: max(f for f in PLAN.full_steps if f < step) for step in PLAN.predicted_steps}
    reuse = torch.stack([(features()[step] - features()[full]).abs().mean() for step, full in last.items()]).mean()

    def train() -> LesaPredictor:
        return lesa.fit(trajectories, PLAN, config, epochs=(2, 2), batch=2, progress=False)

    assert train().losses["closed loop"][-1] < reuse / 2
    time_call(benchmark, train, clock, "training/four epochs/demo")
