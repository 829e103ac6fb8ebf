"""Small tensors from the host to a GPU, without a host that waits for the GPU."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` on ``device``; a copy from pageable memory would wait until all queued work is done."""
    values = values.to(dtype=dtype)
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
