"""The TaylorSeer of diffusers as a method of the comparison, and a counter of full steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig

from lesa.evaluation.methods import Method
from lesa.runtime.record import Record


@dataclass
class Counted:
    """Replaces a handle for a cache of another library: the numbers of the steps that ran."""

    records: list[Record]


def taylorseer(order: int, interval: int) -> Method:
    """diffusers' hook in its lite mode, which skips the blocks and extrapolates the output."""
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
    """The steps of the latest generation at which this block runs, with any cache enabled."""
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
