"""Whether two tensors share memory: an output must not overlap an input."""

import math

import torch
from torch import Tensor


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors share a byte, for any strides; False for tensors without memory (fake ones)."""
    try:
        start, other = first.data_ptr(), second.data_ptr()
    except RuntimeError:  # a tensor that is being traced
        return False
    if start == 0 or start + _extent(first) <= other or other + _extent(second) <= start:
        return False  # an empty tensor may have no address, and neither has one on meta
    if first.numel() == 0 or second.numel() == 0 or first.device != second.device:
        return False
    (starts, size), (others, width) = _pieces(first), _pieces(second)
    # pieces of the second that begin before a piece of the first ends and end after it begins
    begun = torch.searchsorted(others, starts + size)
    ended = torch.searchsorted(others, starts - width, right=True)
    return bool((begun > ended).any())


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _pieces(tensor: Tensor) -> tuple[Tensor, int]:
    """Addresses of the contiguous pieces of a tensor, int64 in rising order, and the bytes of each."""
    piece, outer = tensor.itemsize, list[tuple[int, int]]()
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1 or stride == 0:  # an expanded dimension takes no memory
            continue
        if not outer and stride * tensor.itemsize == piece:
            piece *= size
        else:
            outer.append((stride * tensor.itemsize, size))
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, size in outer:
        starts = (torch.arange(size)[:, None] * stride + starts).flatten()
    assert len(starts) == math.prod(size for _, size in outer)
    return (starts + tensor.data_ptr()).sort().values, piece
