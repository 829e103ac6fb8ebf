"""Bounds checks for interpreted kernels: without them the interpreter reads and writes at any address."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


@contextlib.contextmanager
def memcheck(*tensors: Tensor) -> Iterator[None]:
    """Fail if a lane of a load or store is outside of ``tensors`` and of those allocated inside the context.

    Masked lanes of a load without ``other`` become NaN, since on a GPU their value is undefined.
    """
    known = list(tensors)
    masked_load, masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    new_empty = Tensor.new_empty

    def record(*args, **kwargs):
        known.append(new_empty(*args, **kwargs))
        return known[-1]

    def check(pointers, mask, kind: str) -> np.ndarray:
        active = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[active].astype(np.uint64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for t in known:
            extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            inside |= (addresses >= t.data_ptr()) & (addresses + size <= t.data_ptr() + extent * t.element_size())
        assert inside.all(), f"{kind} out of bounds: {(~inside).sum()} of {inside.size} lanes"
        return active

    def load(self, pointers, mask, other, *rest):
        active = check(pointers, mask, "load")
        result = masked_load(self, pointers, mask, other, *rest)
        if other is None and result.data.dtype.kind == "f":
            result.data = np.where(active, result.data, np.nan).astype(result.data.dtype)
        return result

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask, "store")
        return masked_store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        patch.setattr(torch.Tensor, "new_empty", record)
        yield
