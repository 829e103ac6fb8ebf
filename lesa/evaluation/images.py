"""The images of a pipeline's output as tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def images_of(output: Any) -> Tensor:
    """The images or videos of a pipeline's output, float32 [N, C, H, W] or [N, F, C, H, W] in [0, 1].

    Raises:
        ValueError: for an output that holds neither.
    """
    for name in ("images", "frames"):
        made = getattr(output, name, None)
        if made is not None:
            return _as_tensor(made)
    raise ValueError(f"a {type(output).__name__} holds neither images nor frames; say what to compare: images=")


def as_frames(images: Tensor) -> tuple[Tensor, int]:
    """Frames [N * F, C, H, W] of images or videos, and the number of frames F of each."""
    if images.ndim not in (4, 5):
        raise ValueError(f"images are [N, C, H, W], videos [N, F, C, H, W], not {list(images.shape)}")
    return images.flatten(0, -4), images.shape[1] if images.ndim == 5 else 1


def _as_tensor(made: Any) -> Tensor:
    """From a tensor, an array, PIL images or lists of these."""
    if isinstance(made, Tensor):
        return made.float().cpu()
    if isinstance(made, np.ndarray):
        return torch.from_numpy(made).float().movedim(-1, -3)
    if isinstance(made, list | tuple):
        return torch.stack([_as_tensor(part) for part in made])
    array = np.asarray(made)  # a PIL image
    return torch.from_numpy(array.copy()).float().div(255).reshape(*array.shape[:2], -1).movedim(-1, -3)
