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

from ...checks import autocast_device
from ..kan_linear.reference import bspline_basis


def kan_predict(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    *,
    order: int,
    grid_range: tuple[float, float],
) -> Tensor:
    """history [K, *feature, D], gates [P, E], weights [E, K] and [E, K, C], bias [E], scale [D] -> [P, *feature, D]."""
    accumulate = torch.promote_types(history.dtype, torch.float32)
    with torch.autocast(autocast_device(history), enabled=False):  # it would round the weights
        gates, linear_weight, base_weight, spline_weight, bias = (
            t.to(accumulate) for t in (gates, linear_weight, base_weight, spline_weight, bias)
        )
        s = gates.new_ones(()) if scale is None else scale.to(accumulate)

        def activations(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = h * s
            bases = bspline_basis(x, grid_size=spline_weight.shape[-1] - order, order=order, grid_range=grid_range)
            return h, F.silu(x), bases

        # the experts share their inputs, so weights are summed over the experts first and applied once
        shift, linear, base = gates @ bias, gates @ linear_weight, gates @ base_weight
        spline = torch.einsum("pe,ekg->pkg", gates, spline_weight)
        *older, latest = (h.to(accumulate) for h in history)
        window = [activations(h) for h in older]
        predictions = []
        for p in range(len(gates)):
            window.append(activations(latest))
            linear_part = sum(w * h for w, (h, _, _) in zip(linear[p], window, strict=True))
            kan = sum(b * silu + bases @ c for b, c, (_, silu, bases) in zip(base[p], spline[p], window, strict=True))
            latest = latest + shift[p] + linear_part + kan / s
            predictions.append(latest.to(history.dtype))
            window = window[1:]
    return torch.stack(predictions) if predictions else history.new_empty(0, *history.shape[1:])
