"""All kernels of ``kan_linear`` for cubic splines on five intervals, with all sizes multiples of 16."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lesa_kernels.ops.kan_linear import gradient_kernels, kernels, launch, tiles
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
    for dtype in DTYPES:
        yield _case(f"one-row-{dtype}", kernels.forward_small_kernel, dtype, tiles.ONE_ROW, **cubic)
        yield _case(f"few-rows-{dtype}", kernels.forward_small_kernel, dtype, tiles.FEW_ROWS, **cubic)
        if dtype != "fp32":
            unaligned = {"unaligned": ("in_features", "x_stride")}
            kernel, config = kernels.forward_small_kernel, tiles.FEW_ROWS
            yield _case(f"few-rows-odd-{dtype}", kernel, dtype, config, **unaligned, **cubic)
        yield _case(
            f"sum-{dtype}", gradient_kernels.sum_splits_kernel, dtype, {"BLOCK": launch.SUM_BLOCK}, partial_ptr="*fp32"
        )
    general = {case.name: case for case in _cases_of(tiles.GENERAL)}
    yield from general.values()
    for case in _cases_of(tiles.HOPPER):
        if general.get(case.name) != case:
            rare = case.rare or any(part in case.name for part in ("medium", "odd", "whole"))
            yield replace(case, name=f"hopper-{case.name}", only=90, rare=rare)
    for order in (1, 2):  # compiled too, since the interpreter accepts code that the compiler refuses
        other = {"ORDER": order, "C": 8, "G": launch.BASES}
        for name, kernel, config in (
            ("large", kernels.forward_kernel, tiles.GENERAL.large),
            ("dx", gradient_kernels.input_gradient_kernel, tiles.GENERAL.input_gradient),
        ):
            yield _case(f"{name}-order-{order}-bf16", kernel, "bf16", config[2], **other)


def _cases_of(sizes: tiles.Tiles) -> Iterator[Case]:
    """Cubic splines with tiles of one kind of GPU."""
    cubic = {"ORDER": 3, "C": 8, "G": launch.BASES}
    silu = {"ORDER": 0, "C": 1, "G": 1}
    forward, dx, dw = (
        kernels.forward_kernel,
        gradient_kernels.input_gradient_kernel,
        gradient_kernels.weight_gradient_kernel,
    )
    for dtype, size in DTYPES.items():
        for name in ("wide", "large", "medium"):
            config = getattr(sizes, name)[size]
            if config is not None and (name != "medium" or config != sizes.large[size]):
                yield _case(f"{name}-{dtype}", forward, dtype, config, **cubic)
        yield _case(f"dx-{dtype}", dx, dtype, sizes.input_gradient[size], **cubic)
        config, odd_config = sizes.weight_gradient[size], sizes.odd_weight_gradient[size]
        yield _case(f"dw-base-{dtype}", dw, dtype, odd_config, **silu, SPLINE=False, dw_ptr="*fp32")
        yield _case(f"dw-spline-{dtype}", dw, dtype, config, **cubic, SPLINE=True, dw_ptr="*fp32")
        if dtype != "fp32":  # a single split writes the result directly, in its dtype
            yield _case(f"dw-base-whole-{dtype}", dw, dtype, odd_config, **silu, SPLINE=False)
            yield _case(f"dw-spline-whole-{dtype}", dw, dtype, config, **cubic, SPLINE=True)
        if dtype != "fp16":  # 11 bases, no size a multiple of 16; fp16 compiles like bf16
            odd = {"ORDER": 3, "C": 11, "G": launch.BASES, "unaligned": SIZES}
            yield _case(f"large-odd-{dtype}", forward, dtype, sizes.odd[size], **odd)
            yield _case(f"dx-odd-{dtype}", dx, dtype, sizes.odd_input_gradient[size], **odd)
            yield _case(f"dw-odd-{dtype}", dw, dtype, odd_config, **odd, SPLINE=True)
