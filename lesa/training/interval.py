"""The loss of all steps of an interval in one batch.

A step of LESA is ``h[last] + alpha (w . window + b)``: a row of coefficients for the features before it. In the guided
stage the window holds true features, so the steps of an interval are independent. In the closed loop it holds earlier
predictions, but detached: their values follow from small matrices, and then the steps are independent again. So an
interval of any length takes one pass over the features forward and one backward, and in the closed loop one more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lesa.predictor.predictor import LesaPredictor
from lesa.tables.plan import StepPlan
from lesa_kernels import combine


def intervals(plan: StepPlan) -> Iterator[range]:
    """The runs of consecutive predicted steps."""
    ends = (*plan.full_steps[1:], plan.num_steps)
    for full, end in zip(plan.full_steps, ends, strict=True):
        if end > full + 1:
            yield range(full + 1, end)


def interval_error(
    predictor: LesaPredictor, times: Tensor, interval: range, true: Tensor, window: Tensor, *, closed: bool
) -> Tensor:
    """The sum of all absolute errors of an interval, differentiable in the predictor's parameters.

    Args:
        predictor: its parameters are float32 whatever the features are.
        times: the schedule [steps + 1].
        interval: consecutive predicted steps.
        true: [steps, samples, *feature].
        window: the same, as input of the predictor. In the closed loop the predictions are written into it.
        closed: whether the inputs are its own predictions.
    """
    if predictor.config.latent == "kan":
        return _one_by_one(predictor, times, interval, true, window, closed=closed)
    first = max(0, interval[0] - max(predictor.config.windows))
    coefficients, bias = _rows(predictor, times, interval, first)
    if closed:
        values, shift = _unrolled(coefficients.detach(), bias.detach(), interval, first)
        window[interval[0] : interval[-1] + 1] = combine(window[first : interval[0]], values, shift)
    predictions = combine(window[first : interval[-1]], coefficients, bias)
    return _distance(predictions, true[interval[0] : interval[-1] + 1])


def _rows(predictor: LesaPredictor, times: Tensor, interval: range, first: int) -> tuple[Tensor, Tensor]:
    """Coefficients [interval, last - first] over the features from step ``first`` on, and biases [interval]."""
    rows, biases = [], []
    for step, gate in zip(interval, predictor.gates(times, interval), strict=True):
        layer = predictor.layer(predictor.config.stage(float(times[step])))
        reach = min(layer.in_features, step)
        weight = gate * layer.weight[0, -reach:] + torch.eye(reach, device=gate.device)[-1]
        rows.append(F.pad(weight, (step - reach - first, interval[-1] - step)))
        biases.append(gate * layer.bias[0])
    return torch.stack(rows), torch.stack(biases)


def _unrolled(coefficients: Tensor, bias: Tensor, interval: range, first: int) -> tuple[Tensor, Tensor]:
    """The same rows for the features before the interval only, with predictions inside it expressed by these."""
    known = interval[0] - first
    table = torch.cat([coefficients[:, :known], bias[:, None]], 1).double()
    for row in range(1, len(interval)):
        table[row] += coefficients[row, known : known + row].double() @ table[:row]
    table = table.to(coefficients.dtype)
    return table[:, :-1].contiguous(), table[:, -1].contiguous()


def _one_by_one(
    predictor: LesaPredictor, times: Tensor, interval: range, true: Tensor, window: Tensor, *, closed: bool
) -> Tensor:
    """For a predictor with a KAN on the features, which has no rows of coefficients."""
    total = torch.zeros((), device=true.device)
    for step, gate in zip(interval, predictor.gates(times, interval), strict=True):
        past = window[max(0, step - max(predictor.config.windows)) : step].clone()  # the window is written to below
        prediction = predictor.advance(past, predictor.config.stage(float(times[step])), gate)
        total = total + _distance(prediction, true[step])
        if closed:
            window[step] = prediction.detach()
    return total


def _distance(predictions: Tensor, true: Tensor) -> Tensor:
    exact = torch.promote_types(true.dtype, torch.float32)  # bf16 cannot add millions of numbers
    return (predictions.to(exact) - true.to(exact)).abs().sum()
