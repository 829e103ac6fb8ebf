"""All kernels of ``kan_linear`` for cubic splines on five intervals, with all sizes multiples of 16."""

from collections.abc import Iterator
from typing import Any

from lesa_kernels.ops.kan_linear import gradient_kernels, kernels, launch
from tests.gate.worker import Case

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
SIZES = ("rows", "rows_per_split", "in_features", "out_features", "dy_stride", "x_stride", "splits", "size")
UNSPECIALISED = ("rows", "rows_per_split", "splits")


def _case(
    name: str, kernel: Any, dtype: str, config: dict[str, Any], unaligned: tuple[str, ...] = (), **other: Any
) -> Case:
    """``other``: the compile-time constants, and the types of pointers to another dtype than ``dtype``."""
    options = {k: v for k, v in config.items() if k.startswith(("num_", "maxnreg"))}
    types = {k: v for k, v in other.items() if k.endswith("_ptr")}
    constants = {k: v for k, v in (config | other).items() if k not in options | types}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types.setdefault(argument, f"*{dtype}")
        elif argument in SIZES:
            types[argument] = "i32"
        elif argument not in constants:
            types[argument] = "fp32"
    aligned = tuple(a for a, t in types.items() if t != "fp32" and a not in UNSPECIALISED + unaligned)
    return Case(name, kernel, types, constants, aligned, options, rare=dtype == "fp16")  # compiles like bf16


def cases() -> Iterator[Case]:
    cubic = {"ORDER": 3, "C": 8, "G": launch.BASES}
    silu = {"ORDER": 0, "C": 1, "G": 1}
    for dtype, size in DTYPES.items():
        yield _case(f"one-row-{dtype}", kernels.forward_small_kernel, dtype, launch.ONE_ROW, **cubic)
        yield _case(f"few-rows-{dtype}", kernels.forward_small_kernel, dtype, launch.FEW_ROWS, **cubic)
        if dtype != "fp32":
            unaligned = {"unaligned": ("in_features", "x_stride")}
            kernel, config = kernels.forward_small_kernel, launch.FEW_ROWS
            yield _case(f"few-rows-odd-{dtype}", kernel, dtype, config, **unaligned, **cubic)
        yield _case(f"large-{dtype}", kernels.forward_kernel, dtype, launch.LARGE[size], **cubic)
        if launch.WIDE[size] != launch.LARGE[size]:
            yield _case(f"large-wide-{dtype}", kernels.forward_kernel, dtype, launch.WIDE[size], **cubic)
        yield _case(f"medium-{dtype}", kernels.forward_kernel, dtype, launch.MEDIUM[size], **cubic)
        yield _case(f"dx-{dtype}", gradient_kernels.input_gradient_kernel, dtype, launch.INPUT_GRADIENT[size], **cubic)
        dw, config = gradient_kernels.weight_gradient_kernel, launch.WEIGHT_GRADIENT[size]
        smaller = launch.ODD_WEIGHT_GRADIENT[size]
        yield _case(f"dw-base-{dtype}", dw, dtype, smaller, **silu, SPLINE=False, dw_ptr="*fp32")
        yield _case(f"dw-spline-{dtype}", dw, dtype, config, **cubic, SPLINE=True, dw_ptr="*fp32")
        if dtype != "fp32":  # a single split writes the result directly, in its dtype
            yield _case(f"dw-base-whole-{dtype}", dw, dtype, smaller, **silu, SPLINE=False)
            yield _case(f"dw-spline-whole-{dtype}", dw, dtype, config, **cubic, SPLINE=True)
        if dtype != "fp16":  # 11 bases, no size a multiple of 16; fp16 compiles like bf16
            odd = {"ORDER": 3, "C": 11, "G": launch.BASES, "unaligned": SIZES}
            yield _case(f"large-odd-{dtype}", kernels.forward_kernel, dtype, launch.ODD[size], **odd)
            dx = launch.ODD_INPUT_GRADIENT[size]
            yield _case(f"dx-odd-{dtype}", gradient_kernels.input_gradient_kernel, dtype, dx, **odd)
            yield _case(f"dw-odd-{dtype}", dw, dtype, smaller, **odd, SPLINE=True)
        yield _case(
            f"sum-{dtype}", gradient_kernels.sum_splits_kernel, dtype, {"BLOCK": launch.SUM_BLOCK}, partial_ptr="*fp32"
        )
    for order in (1, 2):  # compiled too, since the interpreter accepts code that the compiler refuses
        other = {"ORDER": order, "C": 8, "G": launch.BASES}
        yield _case(f"large-order-{order}-bf16", kernels.forward_kernel, "bf16", launch.LARGE[2], **other)
        yield _case(
            f"dx-order-{order}-bf16",
            gradient_kernels.input_gradient_kernel,
            "bf16",
            launch.input_gradient_config(order, 2, True),
            **other,
        )
