"""``gram_row`` in plain PyTorch: the specification.

    row[j] = <history[j], feature>

Products are added in float64.
"""

import torch
from torch import Tensor


def gram_row(history: Tensor, feature: Tensor) -> Tensor:
    """history [m, *feature], feature [*feature] -> float64 [m]."""
    feature = feature.double()
    return torch.stack([(h.double() * feature).sum() for h in history])
