"""Patches for Triton's interpreter, so that bf16 kernels give the same results on a CPU as on a GPU.

Without them the interpreter truncates where a GPU rounds to nearest even, and does bf16 arithmetic on the bit patterns
(https://github.com/triton-lang/triton/pull/11585). The overflow checks are switched on, too, so that tests find
addresses computed in 32 bits without a tensor of 2^31 elements.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 bit patterns, rounded to nearest even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    return handle if handle.data.dtype == np.bool_ else TensorHandle(to_bf16(handle.data), tl.bfloat16)


@functools.cache
def repair() -> None:
    """Patch the interpreter of this process, once."""
    cast, binary, unary, dot, fp_to_fp = (
        getattr(InterpreterBuilder, name)
        for name in ("cast_impl", "binary_op", "unary_op", "create_dot", "create_fp_to_fp")
    )
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            return _widened(source) if target.scalar == tl.float32 else cast(self, _widened(source), target)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def binary_op(self, left, right, operation):
        if _is_bf16(left) and _is_bf16(right) and operation not in bitwise:
            return _narrowed(binary(self, _widened(left), _widened(right), operation))
        return binary(self, left, right, operation)

    def unary_op(self, value, operation):
        if _is_bf16(value):
            return _narrowed(unary(self, _widened(value), operation))
        return unary(self, value, operation)

    def create_dot(self, a, b, accumulator, *rest):
        return dot(self, _widened(a), _widened(b), accumulator, *rest)

    for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_dot):
        setattr(InterpreterBuilder, function.__name__, function)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
