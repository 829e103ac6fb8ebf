"""``combine`` in plain PyTorch: the specification.

    out[p] = sum_j coefficients[p, j] * history[j] + bias[p]          every linear forecaster is this sum

Terms are added in float32 at least, and rounded once.
"""

import torch
from torch import Tensor


def combine(history: Tensor, coefficients: Tensor, bias: Tensor | None) -> Tensor:
    """history [m, *feature], coefficients [P, m, *c], bias [P, *c] -> [P, *feature] in the dtype of history.

    ``c`` is empty (one number a feature) or has as many dimensions as a feature and broadcasts to it.
    """
    accumulate = torch.promote_types(history.dtype, torch.float32)
    missing = history.ndim - 1 - (coefficients.ndim - 2)
    c = coefficients.to(accumulate).reshape(*coefficients.shape, *(1,) * missing)
    total = c[:, 0] * history[0].to(accumulate)
    for j in range(1, len(history)):
        total = total + c[:, j] * history[j].to(accumulate)
    if bias is not None:
        total = total + bias.to(accumulate).reshape(*bias.shape, *(1,) * missing)
    return total.to(history.dtype)


def gradients(grad: Tensor, history: Tensor, channels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of coefficients [P, m, *channels] and bias [P, *channels], from grad [P, *feature]; differentiable themselves."""
    accumulate = torch.promote_types(history.dtype, torch.float32)
    grad, count = grad.to(accumulate), len(grad)
    broadcast = channels or (1,) * (grad.ndim - 1)
    columns = [(grad * h.to(accumulate)).sum_to_size(count, *broadcast).reshape(count, *channels) for h in history]
    return torch.stack(columns, 1), grad.sum_to_size(count, *broadcast).reshape(count, *channels)
