"""The rate of a copy, then every function on the feature of every model; FLUX first, large references not at all."""

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.clocks import copy_bandwidth
from benchmarks.gpu.part import Part
from benchmarks.gpu.rows import CLOCK_SECONDS, measure_problem
from benchmarks.problems import combine, gram, head, interval, kan_predict, taylor
from benchmarks.problems.problem import COMPILED, REFERENCE
from benchmarks.shapes import SHAPES, SMOKE, Shape

ORDER = ("FLUX.1-dev 1024", "DiT-XL/2 256", "demo", "HunyuanVideo 480p", "Wan 14B 720p", "Qwen-Image 1328")
PROFILED = ORDER[:2]  # a profile takes half a second
COMPARED = ORDER[:3]  # others only beside a copy: references of videos take seconds
SLOW = (interval.CLOSED_LOOP, interval.KNOWN_GATES)  # 10 to 100 ms a call, so on one model only
COPY = "copy"


def measure(part: Part) -> None:
    sizes = [1 << 16] if part.smoke else [1 << power for power in (22, 25, 28, 30)]
    for size in sizes:
        rate = copy_bandwidth(part.device, size, budget=CLOCK_SECONDS)
        part.add({"operation": COPY, "bytes": 2 * size, "gb_per_s": rate / 1e9})
    shapes = [SMOKE] if part.smoke else [SHAPES[name] for name in ORDER]
    if part.on_gpu:
        largest = torch.cuda.get_device_properties(0).total_memory / 8
        shapes = [shape.within(largest) for shape in shapes]
    for shape in tqdm(shapes, desc="kernels", delay=2):
        without = left_out(shape.name)
        for number, make in enumerate(problems(part, shape)):
            if part.left < 3 and not part.smoke:
                part.skip(f"some functions on the feature of {shape.name}: no time left")
                break
            # a dry run compiles one reference: the others take as long again and show nothing new
            here = {*without, COMPILED} if part.smoke and number > 0 else without
            measure_problem(part, make, without=here, counted=part.smoke or shape.name in PROFILED)


def left_out(name: str) -> set[str]:
    """The providers that are not measured on the feature of this model."""
    if name in (ORDER[0], SMOKE.name):
        return set()
    if name in COMPARED:
        return {COMPILED, *SLOW}
    return {COMPILED, REFERENCE, "released graph", "combine, then modules", interval.STEP_BY_STEP, *SLOW}


def problems(part: Part, shape: Shape) -> list[Callable[[str], Any]]:
    """The problems, the most important ones first."""
    device, several = part.device, shape.coming
    few = shape.within(shape.nbytes)  # 1/8 of the tokens for kan_predict, whose reference is slow
    return [
        lambda backend: combine.predictions(shape, device, several, backend),
        lambda backend: combine.predictions(shape, device, 1, backend),
        lambda backend: head.outputs(shape, device, backend),
        lambda backend: gram.row(shape, device, backend),
        lambda backend: interval.interval(shape, device, backend),
        lambda backend: interval.predicted_step(shape, device, backend),
        lambda backend: kan_predict.predictions(few, device, several, backend),
        lambda backend: kan_predict.predictions(few, device, 1, backend),
        lambda backend: taylor.taylor(shape, device, backend),
        lambda backend: combine.gradients(shape, device, several),
    ]
