"""``kan_predict`` as callers see it: arguments checked, implementation chosen."""

from torch import Tensor

from ..backend import use_triton
from ..kan.ops import check_grid
from . import reference


def kan_predict(
    history: Tensor,
    gates: Tensor,
    linear_weight: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    backend: str = "auto",
) -> Tensor:
    """The next P features from a window of K, by linear weights and a KAN on the features themselves.

    Args:
        history: [K, *feature], oldest first, any float dtype; the last dimension holds the channels D.
        gates: [P, E], how much of every expert each predicted step gets.
        linear_weight: [E, K].
        base_weight: [E, K], weights of SiLU.
        spline_weight: [E, K, grid_size + order], weights of the bases.
        bias: [E].
        scale: [D], multiplies the features into the grid; the KAN's answer is divided by it. None: ones.
        order: degree of the splines.
        grid_range: the uniform grid.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [P, *feature] in the dtype of history; each prediction enters the window of the next. Sums are in float32
        (float64 for a float64 history).

    Raises:
        ValueError: if shapes do not fit together.
    """
    window, experts = len(history), len(bias)
    expected = {
        "gates": (gates, (gates.shape[0], experts)),
        "linear_weight": (linear_weight, (experts, window)),
        "base_weight": (base_weight, (experts, window)),
        "spline_weight": (spline_weight, (experts, window, spline_weight.shape[-1])),
        "scale": (scale, history.shape[-1:]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected {list(shape)} for {window} features and {experts} experts"
            )
    check_grid(spline_weight.shape[-1] - order, order, grid_range)
    use_triton(backend, history)
    return reference.kan_predict(
        history,
        gates,
        linear_weight,
        base_weight,
        spline_weight,
        bias,
        scale=scale,
        order=order,
        grid_range=grid_range,
    )
