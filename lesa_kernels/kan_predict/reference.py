"""``kan_predict`` in plain PyTorch: the specification. LESA with a KAN on the features themselves.

The window holds the K latest features h_0 ... h_{K-1}, oldest first. For each predicted step p, per element:

    x_k    = s * h_k                                                       into the grid, channel by channel
    z_e    = bias_e + sum_k linear_weight[e, k] h_k
             + 1/s * sum_k (base_weight[e, k] silu(x_k) + sum_g spline_weight[e, k, g] B_g(x_k))
    h_hat  = h_{K-1} + sum_e gates[p, e] z_e

and the window rolls: h_hat enters, h_0 leaves. With a zero KAN this is the predicted step of the paper
(LESA, https://arxiv.org/abs/2602.20497), where the gates are the stage's indicator times its KAN of time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kan.reference import bspline_basis


def kan_predict(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None,
    order: int,
    grid_range: tuple[float, float],
) -> Tensor:
    """history [K, *feature, D], gates [P, E], weights [E, K] and [E, K, C], bias [E], scale [D] -> [P, *feature, D]."""
    accumulate = torch.promote_types(history.dtype, torch.float32)
    s = torch.ones((), dtype=accumulate, device=history.device) if scale is None else scale.to(accumulate)
    linear_weight, base_weight, spline_weight = (w.to(accumulate) for w in (linear_weight, base_weight, spline_weight))
    window = list(history.to(accumulate))
    predictions = []
    for gate in gates.to(accumulate):
        # the experts share their inputs, so weights are summed over the experts first and applied once
        total = gate @ bias.to(accumulate)
        linear, base, spline = gate @ linear_weight, gate @ base_weight, torch.einsum("e,ekg->kg", gate, spline_weight)
        for k, h in enumerate(window):
            x = h * s
            bases = bspline_basis(x, grid_size=spline.shape[1] - order, order=order, grid_range=grid_range)
            total = total + linear[k] * h + (base[k] * F.silu(x) + bases @ spline[k]) / s
        window = [*window[1:], window[-1] + total]
        predictions.append(window[-1])
    return torch.stack(predictions).to(history.dtype)
