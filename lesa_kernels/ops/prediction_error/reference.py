"""``prediction_error`` in plain PyTorch: the specification, which a CPU also runs.

    error = sum (feature - sum_j coefficients[j] * history[j] - bias)^2        size = sum feature^2

Differences are taken in float32 at least and their squares added in float64.
"""

import torch
from torch import Tensor

CHUNK = 1 << 16  # elements at a time, which stay in the cache


def prediction_error(history: Tensor, coefficients: Tensor, feature: Tensor, bias: Tensor | None) -> Tensor:
    """history [m, *feature], coefficients [m], feature [*feature], bias [] -> float64 [2], error and size."""
    exact = torch.promote_types(history.dtype, torch.float32)
    rows, truth, weights = history.flatten(1), feature.flatten(), coefficients.to(exact)
    total = torch.zeros(2, dtype=torch.float64, device=history.device)
    for start in range(0, len(truth), CHUNK):
        part = truth[start : start + CHUNK].to(exact)
        rest = part - weights @ rows[:, start : start + CHUNK].to(exact)
        rest = rest if bias is None else rest - bias.to(exact)
        total = total + torch.stack([rest.double().square().sum(), part.double().square().sum()])
    return total
