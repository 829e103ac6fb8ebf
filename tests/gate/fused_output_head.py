"""Configurations of ``fused_output_head`` to compile: those of FLUX, video models and DiT, and extreme sizes."""

from collections.abc import Iterator

from lesa_kernels.ops.fused_output_head.kernels import fused_output_head_kernel
from lesa_kernels.ops.fused_output_head.tiles import TOKENS, tiles
from tests.gate.worker import Case, specialised, with_constants

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISION = {"bf16": "ieee", "fp16": "tf32", "fp32": "ieee"}


def cases() -> Iterator[Case]:
    yield case("flux", "bf16", channels=3072, outputs=64, count=6)
    yield case("flux-10", "bf16", channels=3072, outputs=64, count=9, rare=True)
    yield case("flux-own", "bf16", channels=3072, outputs=64, count=6, modulation="bf16")
    yield case("video", "bf16", channels=3072, outputs=64, count=6, m=10, rare=True)
    yield case("dit", "bf16", channels=1152, outputs=32, count=4)
    yield case("flux", "fp16", channels=3072, outputs=64, count=6)
    yield case("flux", "fp32", channels=3072, outputs=64, count=6)
    yield case("dit", "fp32", channels=1152, outputs=32, count=4, rare=True)
    yield case("demo", "fp32", channels=96, outputs=4, count=6, m=10)
    yield case("one", "bf16", channels=3072, outputs=64, count=1, m=1)
    yield case("many", "bf16", channels=3072, outputs=64, count=9, m=16)
    yield case("wide", "bf16", channels=3072, outputs=384, count=6)
    yield case("widest", "bf16", channels=3072, outputs=384, count=9, m=16)
    yield case("ragged", "bf16", channels=1000, outputs=64, count=6)
    yield case("odd", "bf16", channels=999, outputs=64, count=6)
    yield case("single", "bf16", channels=8, outputs=1, count=2, m=2, rows=1)
    yield case("sum-3", "bf16", channels=3072, outputs=64, count=20, m=3, summed=True)
    yield case("sum-8", "bf16", channels=3072, outputs=64, count=20, m=8, summed=True)
    yield case("sum-3", "fp32", channels=3072, outputs=64, count=20, m=3, summed=True)
    yield case("sum-8", "fp32", channels=3072, outputs=64, count=20, m=8, summed=True, rare=True)
    yield case("sum-8", "fp16", channels=3072, outputs=64, count=20, m=8, summed=True, rare=True)
    yield case("sum-200", "bf16", channels=3072, outputs=64, count=200, m=3, summed=True, rare=True)
    yield case("sum-one", "bf16", channels=3072, outputs=64, count=2, m=3, summed=True, rare=True)
    yield case("sum-own", "bf16", channels=3072, outputs=64, count=20, m=3, summed=True, modulation="bf16", rare=True)
    yield case("sum-wide", "bf16", channels=3072, outputs=384, count=20, m=3, summed=True, rare=True)
    yield case("sum-demo", "fp32", channels=96, outputs=4, count=20, m=3, summed=True)
    yield case("sum-single", "bf16", channels=8, outputs=1, count=2, m=2, rows=1, summed=True, rare=True)
    yield case("sum-ragged", "bf16", channels=1000, outputs=64, count=20, m=3, summed=True, rare=True)


def case(
    model: str,
    dtype: str,
    channels: int,
    outputs: int,
    count: int,
    m: int = 8,
    modulation: str = "fp32",
    rows: int = 4096,
    rare: bool = False,
    summed: bool = False,
) -> Case:
    itemsize = ITEMSIZE[dtype]
    vector = 1 if channels * itemsize % 16 else 16 // itemsize
    short = dtype == "bf16"
    shape = tiles(count, m, outputs, channels, itemsize=itemsize, vector=vector, short=short, summed=summed)
    types = dict.fromkeys(("out", "history", "weight"), f"*{dtype}")
    types |= dict.fromkeys(("means", "coefficients", "table"), "*fp32")
    if summed:
        types |= {"shares": "*fp32", "out": "*fp32" if count > shape.group else f"*{dtype}"}
    types |= {"multiplier": f"*{modulation}", "eps": "fp32"}
    sizes = {"row_stride_vec": rows * channels // vector, "channels_vec": channels // vector, "outputs": outputs}
    types |= dict.fromkeys((*sizes, "samples", "tokens", "modulated", "predictions"), "i32")
    made = Case(
        f"{model}-{dtype}",
        fused_output_head_kernel,
        types,
        {
            **({"P": None} if summed else {"P": count, "shares": None}),
            "M": m,
            "GROUP": shape.group,
            "VEC": vector,
            "TOKENS": TOKENS,
            "CHANNELS": shape.channels,
            "OUTPUTS": shape.outputs,
            "OUTPUT_BLOCKS": shape.blocks,
            "RAGGED": channels % shape.channels != 0,
            "PRECISION": PRECISION[dtype],
            "STAGES": shape.stages,
            "SUMMED": summed,
        },
        (*(n for n, t in types.items() if t[0] == "*"), *(n for n, size in sizes.items() if size % 16 == 0)),
        shape.options,
        rare,
    )
    ones = {name for name, size in sizes.items() if size == 1}
    return with_constants(made, ones & specialised(fused_output_head_kernel))
