"""Configurations of the kernels of ``combine`` to compile: all dtypes and layouts, smallest and largest m and P."""

from collections.abc import Iterator
from typing import Any

from lesa_kernels.ops.combine import kernels, launch
from lesa_kernels.ops.combine.segments import block, group
from tests.gate.worker import Case

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def cases() -> Iterator[Case]:
    for dtype in ITEMSIZE:
        yield forward(dtype, "shared", 6, 8)
        yield forward(dtype, "channel", 6, 8)
        yield dots(dtype, "shared", 1, 8)
        yield dots(dtype, "channel", 1, 8)
    for m, count in ((1, 1), (8, 1), (16, 12), (32, 12)):
        yield forward("bf16", "shared", count, m)
    yield forward("bf16", "sample", 6, 8)
    yield forward("bf16", "channel", 6, 16)
    yield forward("bf16", "shared", 6, 8, aligned=False)
    yield dots("bf16", "shared", 1, 32)
    yield dots("bf16", "shared", 12, 16)
    yield dots("bf16", "shared", 1, 8, sums=False)
    yield dots("bf16", "sample", 6, 8)
    yield dots("bf16", "channel", 4, 8)
    yield dots("bf16", "shared", 6, 8, aligned=False)


def forward(dtype: str, layout: str, count: int, m: int, aligned: bool = True) -> Case:
    return _case(
        f"forward-{dtype}-{layout}-P{count}-m{m}{'' if aligned else '-odd'}",
        kernels.combine_kernel,
        dtype,
        layout,
        aligned,
        ("history", "out"),
        ("coefficients", "bias"),
        {"P": count, "M": m, "BLOCK": block(m, ITEMSIZE[dtype], layout == "channel")},
        launch.COMBINE_OPTIONS,
    )


def dots(dtype: str, layout: str, count: int, m: int, aligned: bool = True, sums: bool = True) -> Case:
    constants = {"P": count, "M": m, "GROUP": group(m, count, layout == "channel")}
    return _case(
        f"dots-{dtype}-{layout}-P{count}-m{m}{'' if aligned else '-odd'}{'' if sums else '-products'}",
        kernels.dots_kernel,
        dtype,
        layout,
        aligned,
        ("history", "left"),
        ("dots", "sums") if sums else ("dots",),
        {**constants, "LANES": launch.THREADS},
        launch.DOTS_OPTIONS,
    )


def _case(
    name: str,
    kernel: Any,
    dtype: str,
    layout: str,
    aligned: bool,
    tokens: tuple[str, ...],
    tables: tuple[str, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Case:
    types = {**dict.fromkeys(tokens, f"*{dtype}"), **dict.fromkeys(tables, "*fp32")}
    constants = {
        **constants,
        "PER_CHANNEL": layout == "channel",
        "VEC": 16 // ITEMSIZE[dtype] if aligned else 1,
        **({"segments": 1} if layout == "shared" else {}),
    }
    for argument in kernel.arg_names:
        if argument not in types and argument not in constants:
            if argument in ("bias", "feature", "dots", "sums"):
                constants[argument] = None
            else:
                types[argument] = "i32"
    # fp16 compiles like bf16, so it is only compiled by make gate
    return Case(name, kernel, types, constants, (*tokens, *tables), options, rare=dtype == "fp16")
