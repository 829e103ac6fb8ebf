"""The memory of a generation: kept features, the outputs of an interval, and scratch tiles of a fixed size."""

import gc

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa import CoefficientTable, LesaConfig, LesaPredictor, StepPlan, Taylor
from lesa.runtime.buffer_layout import BufferLayout
from lesa.runtime.history import FeatureHistory
from lesa_kernels import combine, fused_output_head
from lesa_kernels.ops.combine import cpu as combine_cpu
from lesa_kernels.ops.fused_output_head import cpu as head_cpu
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.strategies import schedule

PLAN = StepPlan.paper(20, 5)


class Allocations(TorchDispatchMode):
    """Records the largest new tensor of any operator."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)
        }
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_a_history_allocates_its_buffer_once_and_nothing_else():
    feature = torch.randn(1, 2048, 512)
    history = FeatureHistory(LesaPredictor(LesaConfig(20, hidden_dim=4)).table(PLAN, schedule(20)))
    for step in PLAN.full_steps:
        with Allocations() as allocations:
            history.keep(step, feature)
        assert allocations.largest in ((history.nbytes,) if step == 0 else (0,))
    # the last full step is kept because steps after it are predicted
    assert history.nbytes == len(PLAN.full_steps) * feature.nbytes


def test_max_history_limits_the_kept_features():
    pipeline, predictor = tiny.pipeline(), LesaPredictor(LesaConfig(10, hidden_dim=4))
    plan, feature = StepPlan(10, [0, 1, 2, 4, 6, 8]), 2 * 16 * 32 * 4
    for limit, rows in ((None, 6), (3, 3), (1, 1)):
        with lesa.enable(pipeline, predictor, plan, max_history=limit) as handle:
            tiny.generate(pipeline)
        assert handle.records[0].kept_bytes == rows * feature


def test_a_prediction_allocates_its_result_and_one_tile():
    for dtype in (torch.float32, torch.bfloat16):
        history = torch.randn(8, 1, 4096, 1024).to(dtype)
        out = torch.empty(1, 1, 4096, 1024, dtype=dtype)
        with Allocations() as allocations:
            combine(history, torch.randn(1, 8), out=out)
        tile = 8 * combine_cpu.TILES * combine_cpu.COLUMNS * 4
        assert allocations.largest <= tile < history[0].nbytes


def test_an_interval_allocates_its_outputs_and_one_tile():
    history, weight = torch.randn(8, 1, 4096, 1024), torch.randn(16, 1024)
    modulation = torch.randn(6, 1, 1024)
    with Allocations() as allocations:
        result = fused_output_head(history, torch.randn(6, 8), None, modulation, modulation, weight)
    tile = head_cpu.TILE * 4
    assert allocations.largest <= max(result.nbytes, tile) < history[0].nbytes


def test_tables_and_buffer_layouts_are_freed_with_their_accelerator():
    pipeline = tiny.pipeline()

    def alive():
        """The identities of all tables and buffer layouts."""
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if isinstance(thing, CoefficientTable | BufferLayout)}

    before = alive()
    with lesa.enable(pipeline, Taylor(1), StepPlan(10, [0, 4])) as handle:
        tiny.generate(pipeline)
        made = alive() - before
        assert len(made) == 2
        tiny.generate(pipeline)
        assert alive() - before == made  # the second generation uses the same objects
    del handle
    assert alive() == before


def test_all_features_are_freed_after_the_last_step():
    pipeline = tiny.pipeline()
    seen = []
    with lesa.enable(pipeline, Taylor(1), StepPlan(10, [0, 4])) as handle:
        free = pipeline.maybe_free_model_hooks

        def look():
            seen.append(handle.going_on)
            free()

        pipeline.maybe_free_model_hooks = look  # runs after the loop, when a VAE would have decoded
        tiny.generate(pipeline)
    assert seen == [[]]
