"""The work of the runtime between two full steps: one predicted step, or the outputs of a whole interval.

LESA's predictor on the paper's plan for N = 7, after the full step 23: seven full features are kept and six steps are
predicted. ``closed loop`` is the released implementation. For every step it runs the gate's KAN, stacks the window of
the eight latest features, applies a linear layer and adds the prediction to the window; then final norm, modulation and
projection.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems.problem import OURS, Problem, relative_error, some
from benchmarks.shapes import Shape
from lesa import LesaConfig, LesaPredictor, StepPlan
from lesa.runtime.history import FeatureHistory
from lesa_kernels import combine, fused_output_head
from lesa_kernels.ops.kan_linear import reference

PLAN, AFTER = StepPlan.paper(50, 7), 23
STEPS = tuple(range(AFTER + 1, min(f for f in PLAN.full_steps if f > AFTER)))
CLOSED_LOOP, KNOWN_GATES = "closed loop", "closed loop, gates known"
STEP_BY_STEP, ONE_PASS = "one combine a step", "one combine an interval"
PROVIDERS = (OURS, ONE_PASS, STEP_BY_STEP, KNOWN_GATES, CLOSED_LOOP)
EPS = 1e-6


class OutputHead:
    """Final norm, modulation and projection of a model, in its dtype."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.multiplier, self.addend = torch.randn(2, len(STEPS), 1, shape.channels, device=device) / 4
        self.multiplier += 1
        self.weight = torch.randn(shape.outputs, shape.channels, device=device) / shape.channels**0.5
        self.weight = self.weight.to(shape.dtype)

    def __call__(self, feature: Tensor, number: int) -> Tensor:
        """The output of one step."""
        x = F.layer_norm(feature, feature.shape[-1:], eps=EPS)
        scale, shift = (t[number].unsqueeze(1).to(x.dtype) for t in (self.multiplier, self.addend))
        return F.linear(x * scale + shift, self.weight.to(x.dtype))


class ClosedLoop:
    """The released predictor: eager operators, all in the dtype of the features."""

    def __init__(self, predictor: LesaPredictor, times: Tensor, device: str, dtype: torch.dtype) -> None:
        self.config = predictor.config
        self.times = times
        self.layers = [
            [
                (layer.base_weight.to(device, dtype), layer.scaled_spline_weight.to(device, dtype))
                for layer in gate.layers
            ]
            for gate in predictor.timestep
        ]
        self.latent = [
            (layer.weight.to(device, dtype), layer.bias.to(device, dtype))  # type: ignore[operator, union-attr]
            for layer in predictor.latent
        ]

    def gate(self, step: int, stage: int, like: Tensor) -> Tensor:
        """The gate alpha, from the time offsets of the schedule."""
        x = (self.times[step] - self.times).to(like.device, like.dtype)
        for base, spline in self.layers[stage]:
            x = reference.kan_linear(x, base, spline, order=3, grid_range=self.config.grid_range)
        return x

    def __call__(self, window: list[Tensor], step: int, gate: Tensor | None = None) -> Tensor:
        """The feature of ``step`` from the features before it; ``gate``: its value if it is known."""
        stage = self.config.stage(float(self.times[step]))
        latest = window[-self.config.windows[stage] :]
        weight, bias = self.latent[stage]
        z = F.linear(torch.stack(latest, dim=-1), weight[:, -len(latest) :], bias).squeeze(-1)
        return latest[-1] + (self.gate(step, stage, z) if gate is None else gate) * z


def interval(shape: Shape, device: str, backend: str = "auto") -> Problem:
    """The outputs of all predicted steps between two full steps."""
    return _problem(shape, device, backend, STEPS)


def predicted_step(shape: Shape, device: str, backend: str = "auto") -> Problem:
    """The output of the first predicted step only."""
    return _problem(shape, device, backend, STEPS[:1])


@torch.no_grad()
def _problem(shape: Shape, device: str, backend: str, steps: tuple[int, ...]) -> Problem:
    torch.manual_seed(0)
    predictor = LesaPredictor(LesaConfig(PLAN.num_steps)).requires_grad_(False)
    times = torch.linspace(1, 0, PLAN.num_steps + 1, dtype=torch.float64)
    table = predictor.table(PLAN, times)
    output_head = OutputHead(shape, device)
    loop = ClosedLoop(predictor, times, device, shape.dtype)
    full = [step for step in PLAN.full_steps if step <= AFTER]

    def make() -> tuple[Any, ...]:
        history = FeatureHistory(table)
        common = torch.randn(shape.feature, device=device)
        features = {}
        for step in full:
            features[step] = (common + torch.randn(shape.feature, device=device) / 4).to(shape.dtype)
            history.keep(step, features[step])
        stacked = torch.stack(list(features.values()))
        for step in (s for s in range(AFTER) if s not in features):
            row = table.coefficients[PLAN.predicted_steps.index(step), : len(full)]
            made = torch.tensordot(row.to(device, torch.float32), stacked.float(), dims=1)
            features[step] = made.to(shape.dtype)
        return history, [features[step] for step in range(AFTER + 1)]

    def precomputed(history: FeatureHistory, _: list[Tensor]) -> Tensor:
        coming = history.predict_interval(STEPS[0])
        assert coming.bias is not None
        return fused_output_head(
            coming.history,
            coming.coefficients[: len(steps)],
            coming.bias[: len(steps)],
            output_head.multiplier[: len(steps)],
            output_head.addend[: len(steps)],
            output_head.weight,
            eps=EPS,
            means=coming.means,
            backend=backend,
        )

    def step_by_step(history: FeatureHistory, _: list[Tensor]) -> Tensor:
        return torch.stack([output_head(history.predict(step), p) for p, step in enumerate(steps)])

    def one_pass(history: FeatureHistory, _: list[Tensor]) -> Tensor:
        coming = history.predict_interval(STEPS[0])
        assert coming.bias is not None
        predictions = combine(
            coming.history, coming.coefficients[: len(steps)], coming.bias[: len(steps)], backend=backend
        )
        return torch.stack([output_head(prediction, p) for p, prediction in enumerate(predictions)])

    like = torch.zeros((), device=device, dtype=shape.dtype)
    known = {step: loop.gate(step, predictor.config.stage(float(times[step])), like) for step in steps}

    def closed_loop(_: FeatureHistory, features: list[Tensor], gates: dict[int, Tensor] | None = None) -> Tensor:
        window, outputs = list(features), []
        for p, step in enumerate(steps):
            window.append(loop(window, step, None if gates is None else gates[step]))
            outputs.append(output_head(window[-1], p))
        return torch.stack(outputs)

    def error(inputs: tuple[Any, ...], result: Tensor) -> float:
        part = some(shape.tokens)
        features = inputs[1]
        stacked = torch.stack([features[step][:, part] for step in full]).double()
        exact = []
        for p, step in enumerate(steps):
            row = table.coefficients[PLAN.predicted_steps.index(step), : len(full)].to(device)
            bias = table.bias[PLAN.predicted_steps.index(step)].to(device)
            exact.append(output_head(torch.tensordot(row, stacked, dims=1) + bias, p))
        return relative_error(result[:, :, part], torch.stack(exact))

    functions: dict[str, Callable[..., Any]] = {
        OURS: precomputed,
        ONE_PASS: one_pass,
        STEP_BY_STEP: step_by_step,
        KNOWN_GATES: lambda history, features: closed_loop(history, features, known),
        CLOSED_LOOP: closed_loop,
    }
    return Problem(
        operation="interval" if len(steps) > 1 else "predicted step",
        direction="forward",
        shape=shape.name,
        nbytes=len(full) * shape.nbytes + len(steps) * shape.nbytes // shape.channels * shape.outputs,
        make=make,
        functions=functions,
        error=error,
        dtype=shape.dtype,
    )
