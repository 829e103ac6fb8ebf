"""Configurations of ``kan_predict`` to compile: cubic splines on five intervals, as in the paper's KANs."""

from lesa_kernels.ops.kan_predict import kernels
from tests.gate.worker import Case

ORDER, BASES, WIDTH = 3, 8, 16
VEC = {"bf16": 8, "fp16": 8, "fp32": 4}  # elements in 16 bytes
LANES, WARPS = 128, 4


def cases() -> list[Case]:
    return [
        *(predict(dtype, k, p, scaled=True) for dtype in VEC for k in (4, 8) for p in (1, 6)),
        predict("bf16", 8, 1, scaled=False),
        predict("bf16", 8, 6, scaled=False),
        predict("bf16", 16, 16, scaled=True),  # the most open steps that the kernel supports
        fold(8),
    ]


def predict(dtype: str, k: int, p: int, *, scaled: bool) -> Case:
    pointers = {"history": f"*{dtype}", "table": "*fp32", "out": f"*{dtype}"} | ({"scale": "*fp32"} if scaled else {})
    sizes = dict.fromkeys(("length_vec", "row_stride_vec", "channels_vec"), "i32")
    shape = {"K": k, "P": p, "C": BASES, "ORDER": ORDER, "WIDTH": WIDTH, "VEC": VEC[dtype], "LANES": LANES}
    return Case(
        name=f"{dtype} K={k} P={p} {'scaled' if scaled else 'unscaled'}",
        kernel=kernels.predict_kernel,
        types=pointers | sizes | {"knots_per_unit": "fp32", "knot_offset": "fp32"},
        constants=shape if scaled else shape | {"scale": None},
        aligned=tuple(pointers),
        options={"num_warps": WARPS},
        rare=dtype == "fp16" or (k == 4 and p == 1),  # fp16 compiles like bf16
    )


def fold(k: int) -> Case:
    weights = dict.fromkeys(("gates", "linear_weight", "base_weight", "spline_weight", "bias"), "*bf16")
    return Case(
        name="fold",
        kernel=kernels.fold_kernel,
        types={"table": "*fp32", **weights, "experts": "i32"},
        constants={"K": k, "C": BASES, "ORDER": ORDER, "ROWS": 16, "WIDTH": WIDTH},
        aligned=("table", *weights),
        options={"num_warps": WARPS},
    )
