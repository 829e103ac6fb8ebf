"""diffusers' own TaylorSeer beside ours, and a way to count the steps that it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig

from lesa.evaluation.methods import Method
from lesa.runtime.record import Record


@dataclass
class Counted:
    """What stands in for a handle where another library decides: steps that ran, by number."""

    records: list[Record]


def taylorseer(order: int, interval: int) -> Method:
    """Their hook in its lite mode, which skips the blocks and extrapolates the output."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )

    @contextmanager
    def enabled(pipeline: FluxPipeline) -> Iterator[Counted]:
        pipeline.transformer.enable_cache(config)
        try:
            with count_full_steps(pipeline) as full:
                yield Counted([Record("transformer", "cond", full=full)])
        finally:
            pipeline.transformer.disable_cache()

    return Method(f"diffusers TaylorSeer {order}", f"TaylorSeer interval={interval}", enabled)


@contextmanager
def count_full_steps(pipeline: FluxPipeline, block: int = 0) -> Iterator[list[int]]:
    """The steps at which this block really runs, whoever decides on that; those of the latest generation."""
    runs: list[int] = []

    def note(*_: object) -> None:
        step = pipeline.scheduler.step_index or 0
        if runs and step <= runs[-1]:
            runs.clear()
        runs.append(step)

    handle = pipeline.transformer.transformer_blocks[block].attn.register_forward_pre_hook(note)
    try:
        yield runs
    finally:
        handle.remove()
