"""Configurations of ``prediction_error`` to compile: all dtypes, few and many features, aligned and unaligned."""

from collections.abc import Iterator

from lesa_kernels.ops.prediction_error import kernels, launch
from tests.gate.worker import Case

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def cases() -> Iterator[Case]:
    for dtype in ITEMSIZE:
        yield case(dtype, 8)
    for m in (1, 16, 32):
        yield case("bf16", m)
    yield case("bf16", 8, aligned=False)


def case(dtype: str, m: int, aligned: bool = True) -> Case:
    pointers = {"history": f"*{dtype}", "feature": f"*{dtype}"} | dict.fromkeys(
        ("coefficients", "bias", "sums"), "*fp32"
    )
    return Case(
        f"prediction_error-{dtype}-m{m}{'' if aligned else '-odd'}",
        kernels.prediction_error_kernel,
        pointers | dict.fromkeys(("row_stride_vec", "length_vec", "steps"), "i32"),
        {"M": m, "VEC": 16 // ITEMSIZE[dtype] if aligned else 1, "LANES": launch.LANES},
        tuple(pointers),
        launch.OPTIONS,
        rare=dtype == "fp16",
    )
