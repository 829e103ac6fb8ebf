"""``combine`` as callers see it: arguments checked, implementation chosen."""

from torch import Tensor

from ..backend import use_triton
from . import reference


def combine(
    history: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Several predictions from the same kept features: ``out[p] = sum_j coefficients[p, j] history[j] + bias[p]``.

    Args:
        history: [m, *feature], m >= 1, any float dtype.
        coefficients: [P, m, *c], float32 (float64 for a float64 history). ``c`` is empty, or broadcasts to a feature:
            [1, 1, D] gives every channel its own numbers, [B, 1, 1] every sample.
        bias: [P, *c], in the dtype of the coefficients.
        out: [P, *feature] in the dtype of history, to be overwritten; not together with gradients.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        [P, *feature] in the dtype of history. Sums are in float32 (float64) and rounded once.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    _check(history, coefficients, bias, out)
    use_triton(backend, history)
    result = reference.combine(history, coefficients, bias)
    return result if out is None else out.copy_(result)


def _check(history: Tensor, coefficients: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    m, feature = len(history), history.shape[1:]
    if coefficients.ndim < 2 or coefficients.shape[1] != m or m == 0:
        raise ValueError(
            f"coefficients {list(coefficients.shape)} must be [P, {m}, ...] for the {m} features in history"
        )
    channels = coefficients.shape[2:]
    fits = len(channels) == len(feature) and all(c in (1, n) for c, n in zip(channels, feature, strict=True))
    if channels and not fits:
        raise ValueError(
            f"coefficients {list(coefficients.shape)}: {list(channels)} does not broadcast to {list(feature)}"
        )
    if bias is not None and bias.shape != (len(coefficients), *channels):
        raise ValueError(f"bias {list(bias.shape)} must be {[len(coefficients), *channels]}, as the coefficients are")
    if out is not None and (out.shape != (len(coefficients), *feature) or out.dtype != history.dtype):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, the result is {history.dtype} {[len(coefficients), *feature]}"
        )
