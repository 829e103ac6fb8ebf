"""Runs every kernel once on small and odd shapes, for compute-sanitizer, which takes minutes for large ones.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

import os
import sys
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.problems import combine, gram, head, kan_linear, kan_predict
from benchmarks.problems.problem import OURS
from benchmarks.shapes import SMOKE


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the interpreter has no bf16 products
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    problems = []
    for dtype in dtypes:
        few = "--few" in sys.argv
        for tokens, channels in ((96, 64),) if few else ((96, 64), (7, 33)):
            shape = replace(SMOKE, dtype=dtype, tokens=tokens, channels=channels)
            problems += [
                combine.predictions(shape, device, 1, "triton"),
                combine.predictions(shape, device, 3, "triton"),
                gram.row(shape, device, "triton"),
                head.outputs(shape, device, "triton"),
                kan_predict.predictions(shape, device, 2, "triton"),
            ]
        for rows, inputs, outputs in (
            ((8, 16, 16),) if few else ((8, 16, 16), (5, 7, 3), (130, 32, 48), (4096, 256, 256))
        ):
            layer = replace(kan_linear.SMOKE, rows=rows, inputs=inputs, outputs=outputs, dtype=dtype)
            problems += [kan_linear.layer(layer, device, d, "triton") for d in ("forward", "backward")]
    for problem in problems:
        with torch.inference_mode(problem.direction == "forward"):
            problem.ready(OURS)
    print(f"{len(problems)} kernels ran and were right")


if __name__ == "__main__":
    main()
