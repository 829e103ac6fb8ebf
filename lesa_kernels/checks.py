"""Checks of arguments that all operations share. An error message is one sentence that names the argument."""

import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton kernels


def check_tensors(required: Mapping[str, object], optional: Mapping[str, object] | None = None) -> None:
    """Raise ValueError unless all are real floating-point tensors on one device; an optional one may be None.

    Integers would be truncated, and tensors on ``meta`` have no numbers.
    """
    names = dict(required)
    if optional is not None:
        names.update((name, tensor) for name, tensor in optional.items() if tensor is not None)
    first, device = "", None
    for name, tensor in names.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, not {_what(tensor)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {tensor.dtype}, it must be float32, bfloat16, float16 or float64; convert it with .float()"
            )
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}; move them to one device")


def check_whole(**numbers: object) -> None:
    """Raise ValueError unless all are whole numbers, so that 2.5 is not taken for 2."""
    for name, number in numbers.items():
        whole = isinstance(number, (Integral, torch.SymInt)) and not isinstance(number, bool)
        if not whole:
            raise ValueError(f"{name} must be a whole number, not {number!r}")


def check_not_negative(**numbers: object) -> None:
    """Raise ValueError unless all are numbers from zero on, neither NaN nor infinite."""
    for name, number in numbers.items():
        real = isinstance(number, (Real, torch.SymFloat, torch.SymInt)) and not isinstance(number, bool)
        if not real or not 0 <= number < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} must be a finite number of at least zero, not {number!r}")


def check_feature(history: Tensor, feature: Tensor) -> None:
    """Raise ValueError unless history is [m, *feature] and feature [*feature], in one dtype."""
    if history.ndim == 0:
        raise ValueError("history [] must be [m, *feature]: the kept features, one after the other")
    if feature.shape != history.shape[1:] or feature.dtype != history.dtype:
        raise ValueError(
            f"feature is {feature.dtype} {list(feature.shape)}, those in history are {history.dtype} "
            f"{list(history.shape[1:])}"
        )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of a result of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_contiguous_rows(history: Tensor) -> bool:
    """Whether every feature of history [m, *feature] is contiguous; rows may lie apart."""
    expected = 1
    for size, stride in zip(reversed(history.shape[1:]), reversed(history.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def autocast_device(tensor: Tensor) -> str:
    """The device type whose autocast acts on a tensor; there is none for ``meta``, where nothing is rounded."""
    return "cpu" if tensor.is_meta else tensor.device.type


def _what(value: object) -> str:
    kind = type(value)
    if value is None:
        return "None"
    if kind.__module__ == "numpy":
        return f"a numpy {kind.__name__}; torch.as_tensor makes one"
    if isinstance(value, (list, tuple)):
        return f"a {kind.__name__}; torch.stack makes one of tensors, torch.tensor of numbers"
    return f"{kind.__name__}"
