"""``KANLinear`` and ``KAN`` as modules. Constructors and state_dicts are those of efficient-kan.

(https://github.com/Blealtan/efficient-kan.) Its checkpoints load unchanged; what differs is ``update_grid``, which
here leaves the function as it was.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...checks import check_not_negative, check_tensors, check_whole
from .arguments import check_grid
from .bsplines import from_bsplines, to_bsplines
from .op import run_layer
from .reference import cox_de_boor, uniform_knots
from .uniform import is_uniform

if TYPE_CHECKING:
    from scipy.interpolate import BSpline


class KANLinear(nn.Module):
    """A linear layer whose every edge is a learned function: a SiLU and a B-spline.

    Outside the grid the bases fade over ``spline_order`` intervals on each side; beyond that the spline part is
    exactly zero and only the SiLU part remains. Inputs are not clamped. ``update_grid`` moves the grid to the data.

    Args:
        in_features, out_features: sizes of the last dimension.
        grid_size: intervals of the grid.
        spline_order: degree of the splines.
        scale_noise: size of the random function that the splines start from.
        scale_base, scale_spline: gains of the two initialisations.
        enable_standalone_scale_spline: a learned factor for every edge, as in efficient-kan.
        base_activation: SiLU; another one is evaluated in plain PyTorch.
        grid_eps: 0 makes an updated grid follow the data's quantiles, 1 keeps it uniform.
        grid_range: the grid before any update.

    Raises:
        ValueError: for sizes that are no whole numbers, or a grid that does not exist.

    Shapes: [..., in_features] -> [..., out_features], in the dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        base_activation: type[nn.Module] = nn.SiLU,
        grid_eps: float = 0.02,
        grid_range: Sequence[float] = (-1, 1),
    ) -> None:
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features, spline_order=spline_order)
        check_grid(grid_size, spline_order, grid_range)
        check_not_negative(scale_noise=scale_noise, scale_base=scale_base, scale_spline=scale_spline, grid_eps=grid_eps)
        if grid_eps > 1:
            raise ValueError(f"grid_eps must be between 0 (quantiles) and 1 (uniform), not {grid_eps}")
        self.in_features = in_features
        self.out_features = out_features
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.scale_noise = scale_noise
        self.scale_base = scale_base
        self.scale_spline = scale_spline
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        self.base_activation = base_activation()
        self.grid_eps = grid_eps
        self.grid_range = (float(grid_range[0]), float(grid_range[1]))

        self.grid: Tensor
        self.register_buffer("grid", self._uniform_grid().to(torch.get_default_dtype()))
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, grid_size + spline_order))
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The grid of the constructor, Kaiming-uniform base weights, and splines fitted to a little noise."""
        if self.grid.is_meta:  # the values come from a file, or from a later call after ``to_empty``
            return
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * self.scale_base)
        with torch.no_grad():
            self.grid.copy_(self._uniform_grid())
            inside = self.grid.T[self.spline_order : -self.spline_order or None]  # [grid_size + 1, in]
            noise = torch.rand(self.grid_size + 1, self.in_features, self.out_features, device=self.grid.device) - 0.5
            noise *= self.scale_noise / self.grid_size
            gain = 1.0 if self.enable_standalone_scale_spline else self.scale_spline
            self.spline_weight.copy_(gain * self.curve2coeff(inside, noise))
            if self.enable_standalone_scale_spline:
                nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5) * self.scale_spline)

    @property
    def has_uniform_grid(self) -> bool:
        """Whether the knots are those of the constructor, within float32 rounding; waits for a GPU."""
        return is_uniform(self.grid, self.spline_order, self.grid_range)

    @property
    def scaled_spline_weight(self) -> Tensor:
        """[out, in, grid_size + spline_order], the edge's own factor multiplied in."""
        if self.enable_standalone_scale_spline:
            return self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return self.spline_weight

    def b_splines(self, x: Tensor) -> Tensor:
        """Bases at x [batch, in] -> [batch, in, grid_size + spline_order]."""
        check_tensors({"x": x, "grid": self.grid})
        return cox_de_boor(x, self.grid, self.spline_order)

    def curve2coeff(self, x: Tensor, y: Tensor) -> Tensor:
        """Least-squares coefficients [out, in, C] of the curves through x [batch, in], y [batch, in, out].

        Solved in float64 by the pseudo-inverse: exact where the data determine a coefficient, zero where no point
        touches its basis.
        """
        solution = torch.linalg.pinv(self._expand_exactly(x)) @ y.double().transpose(0, 1)  # [in, C, out]
        return torch.permute(solution, (2, 0, 1)).to(self.spline_weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_activation, nn.SiLU):
            return run_layer(
                x,
                self.base_weight,
                self.scaled_spline_weight,
                order=self.spline_order,
                grid_range=self.grid_range,
                grid=self.grid,
                look=True,
                backend="auto",
            )
        return F.linear(self.base_activation(x), self.base_weight) + F.linear(
            self.b_splines(x).flatten(-2), self.scaled_spline_weight.flatten(1)
        )

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to where the inputs x [..., in] are, and refit the splines to the function they had.

        On the range of x (plus ``margin``) the function changes by no more than the error of that fit. It runs in
        float64, whatever the dtype of the layer, and never holds the curves of all edges.

        Raises:
            ValueError: if there is no input, or one that is not finite; for a ``margin`` below zero.
        """
        check_tensors({"x": x, "grid": self.grid})
        check_not_negative(margin=margin)
        x = x.reshape(-1, self.in_features).double()
        if len(x) == 0 or not x.isfinite().all():
            raise ValueError(
                f"update_grid needs finite inputs, at least one; x is {list(x.shape)} with NaN or infinity"
            )
        ordered = x.sort(dim=0).values
        quantiles = torch.linspace(0, len(x) - 1, self.grid_size + 1, device=x.device).round().long()
        adaptive = ordered[quantiles]  # [grid_size + 1, in]
        low, high = ordered[0] - margin, ordered[-1] + margin
        fraction = torch.linspace(0, 1, self.grid_size + 1, dtype=x.dtype, device=x.device).unsqueeze(1)
        inside = torch.lerp(adaptive, low + fraction * (high - low), self.grid_eps)
        inside[0], inside[-1] = low, high
        step = (high - low) / self.grid_size
        beyond = torch.arange(1, self.spline_order + 1, dtype=x.dtype, device=x.device).unsqueeze(1) * step
        knots = torch.cat([low - beyond.flip(0), inside, high + beyond])

        # Least squares is linear in the curve, the curve in its coefficients: one matrix for each input converts old to
        # new ones. The scaler of an edge multiplies its whole curve, so it does not change.
        old = self._expand_exactly(x)
        self.grid.copy_(knots.T)
        transfer = torch.linalg.pinv(self._expand_exactly(x)) @ old  # [in, C, C]
        self.spline_weight.copy_(torch.einsum("icd,oid->oic", transfer, self.spline_weight.double()))

    def _expand_exactly(self, x: Tensor) -> Tensor:
        """Bases of x [batch, in] in float64: [in, batch, C]."""
        return cox_de_boor(x.double(), self.grid.double(), self.spline_order).transpose(0, 1)

    def regularization_loss(self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0) -> Tensor:
        """efficient-kan's stand-in for the paper's L1 penalty: mean absolute coefficients and their entropy.

        In float32 at least. An edge whose coefficients are all zero adds nothing, where efficient-kan's formula is NaN.
        """
        exact = torch.promote_types(self.spline_weight.dtype, torch.float32)
        size = self.spline_weight.to(exact).abs().mean(-1)
        total = size.sum()
        share = size / total.clamp(min=torch.finfo(exact).tiny)
        entropy = -(share * torch.where(share > 0, share, 1).log()).sum()
        return regularize_activation * total + regularize_entropy * entropy

    def to_bsplines(self) -> "list[BSpline]":
        """The splines as scipy's: one for each input, from x [...] to [..., out], equal to the layer's on every x.

        Without the SiLU part, scalers multiplied in, in float64.

        Raises:
            ImportError: without scipy.
        """
        return to_bsplines(self.grid, self.scaled_spline_weight, self.spline_order)

    @classmethod
    def from_bsplines(cls, splines: "Sequence[BSpline]", dtype: torch.dtype | None = None) -> Self:
        """A layer of scipy's splines, one for each input, with coefficients [C] or [C, out] on any knots.

        Base weights are zero and scalers one. Between ``t[k]`` and ``t[-k - 1]`` it is their sum; outside it fades to
        zero over the outer knots, where scipy extrapolates.

        Raises:
            ValueError: if the splines do not fit into one layer.
        """
        knots, coefficients, order = from_bsplines(splines)
        out_features, in_features, bases = coefficients.shape
        low, high = knots[0, order].item(), knots[0, -order - 1].item()
        layer = cls(in_features, out_features, bases - order, order, grid_range=(low, high)).to(dtype)
        with torch.no_grad():
            layer.grid.copy_(knots)
            # scipy's last interval contains its right end, ours is half open: end knots that coincide move by one ulp.
            last = layer.grid[:, -1:].clone()
            closed = (layer.grid[:, -order - 1 :] == last).all(1, keepdim=True) & (layer.grid == last)
            layer.grid.copy_(torch.where(closed, layer.grid.nextafter(torch.full_like(last, torch.inf)), layer.grid))
            layer.base_weight.zero_()
            layer.spline_weight.copy_(coefficients)
            layer.spline_scaler.fill_(1)
        return layer

    def extra_repr(self) -> str:
        grid = f"{self.grid_range}" if self.grid.is_meta or self.has_uniform_grid else "explicit"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid={grid}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to(dtype)`` keeps the knots in float32; in bf16 they would be off by up to 1 % of an interval."""
        grid = self.grid
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.grid.dtype != grid.dtype and self.grid.itemsize < 4:
            self.grid = grid.to(self.grid.device)
        return self

    def _uniform_grid(self) -> Tensor:
        return uniform_knots(self.grid_size, self.spline_order, self.grid_range).repeat(self.in_features, 1)


class KAN(nn.Module):
    """A stack of :class:`KANLinear`: ``KAN([51, 256, 256, 1])`` maps [..., 51] to [..., 1].

    Args:
        layers_hidden: the width before, between and after the layers.
        grid_size, spline_order, options: those of :class:`KANLinear`.
    """

    def __init__(self, layers_hidden: Sequence[int], grid_size: int = 5, spline_order: int = 3, **options: Any) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.layers = nn.ModuleList(
            KANLinear(in_features, out_features, grid_size, spline_order, **options)
            for in_features, out_features in itertools.pairwise(layers_hidden)
        )

    def forward(self, x: Tensor, update_grid: bool = False) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, KANLinear)
            if update_grid:
                layer.update_grid(x)
            x = layer(x)
        return x

    def regularization_loss(self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0) -> Tensor:
        """Sum over the layers."""
        layers: Any = self.layers
        return torch.stack([la.regularization_loss(regularize_activation, regularize_entropy) for la in layers]).sum()
