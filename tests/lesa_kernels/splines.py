"""B-splines computed by scipy, as an independent reference."""

import numpy as np
from scipy.interpolate import BSpline


def knots_of(grid_size: int, order: int, grid_range: tuple[float, float]) -> np.ndarray:
    low, high = grid_range
    return low + np.arange(-order, grid_size + order + 1) * ((high - low) / grid_size)


def scipy_bases(x: np.ndarray, knots: np.ndarray, order: int, derivative: int = 0) -> np.ndarray:
    """float64 x [...] -> [..., len(knots) - order - 1], or their derivatives."""
    pieces = (knots[g : g + order + 2] for g in range(len(knots) - order - 1))
    elements = [BSpline.basis_element(piece, extrapolate=False) for piece in pieces]
    return np.stack([np.nan_to_num(e(x, nu=derivative)) for e in elements], axis=-1)
