"""The KAN layer of efficient-kan (https://github.com/Blealtan/efficient-kan), written from its formula.

It computes all bases by Cox-de Boor on stored knots, in tensors [rows, in, C] and wider, then two F.linear. Parameters
and knots have the names and shapes of efficient-kan's checkpoints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EfficientKANLinear(nn.Module):
    """[rows, in] -> [rows, out]."""

    grid: Tensor

    def __init__(
        self, in_features: int, out_features: int, grid_size: int, order: int, grid_range: tuple[float, float]
    ) -> None:
        super().__init__()
        self.order = order
        low, high = grid_range
        knots = torch.arange(-order, grid_size + order + 1) * ((high - low) / grid_size) + low
        self.register_buffer("grid", knots.repeat(in_features, 1))
        self.base_weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.zeros(out_features, in_features, grid_size + order))
        self.spline_scaler = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        t, at = self.grid, x.unsqueeze(-1)
        bases = ((at >= t[:, :-1]) & (at < t[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            rising = (at - t[:, : -k - 1]) / (t[:, k:-1] - t[:, : -k - 1])
            falling = (t[:, k + 1 :] - at) / (t[:, k + 1 :] - t[:, 1:-k])
            bases = rising * bases[..., :-1] + falling * bases[..., 1:]
        weight = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(bases.flatten(1), weight.flatten(1))
