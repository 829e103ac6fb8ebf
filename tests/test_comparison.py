"""What docs/comparison.md says of others, as the installed packages do it."""

import dataclasses
import inspect

import cache_dit
import pytest
import torch
from cache_dit.caching.cache_contexts import cache_manager
from cache_dit.caching.cache_contexts.cache_context import CachedContext
from cache_dit.caching.cache_contexts.calibrators import Calibrator
from cache_dit.caching.cache_contexts.calibrators.dmd import DMDState
from cache_dit.caching.cache_contexts.calibrators.foca import FoCaState
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import first_block_cache, mag_cache, taylorseer_cache

from tests.lesa.adapters import tiny


def on_a_line(state, full=(0, 2, 4), step=5):
    """What a state of one tensor predicts of the step's own number, having seen those of the full steps."""
    for now in range(step):
        state.mark_step_begin()
        if now in full:
            state.update(torch.tensor([float(now)]))
    state.mark_step_begin()
    return state.approximate().item()


def test_cache_dit_has_these_calibrators_and_no_public_way_to_add_one():
    assert Calibrator._supported_calibrators == ["taylorseer", "dmd", "foca"]
    assert not [name for name in dir(cache_dit) if "register" in name and "alibrat" in name]
    with pytest.raises(AssertionError, match="not supported"):
        Calibrator(cache_dit.CalibratorConfig(enable_calibrator=True, calibrator_type="mine"))


def test_cache_dit_runs_one_block_at_least():
    pipeline = tiny.pipeline()
    cache_dit.enable_cache(pipeline, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=0, num_inference_steps=4))
    try:
        with pytest.raises(AssertionError, match="must be >= 1"):
            tiny.generate(pipeline)
    finally:
        cache_dit.disable_cache(pipeline)


def test_a_straight_line_is_continued_by_taylorseer_and_not_by_foca_in_cache_dit():
    assert on_a_line(TaylorSeerState(n_derivatives=1)) == 5
    assert on_a_line(FoCaState()) > 5.5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylorseer_keeps_this_many_tensors(order):
    theirs = TaylorSeerState(n_derivatives=order)
    on_a_line(theirs, full=range(12), step=12)
    assert sum(tensor is not None for kept in theirs.state.values() for tensor in kept) == 2 * (order + 1)

    hook = taylorseer_cache.TaylorSeerState(torch.float32, max_order=order)
    for step in range(6):
        hook.current_step = step
        hook.update((torch.ones(2),))
    assert len(hook.taylor_factors[0]) == order + 1


def test_dmd_is_no_table_since_it_is_not_linear_in_the_features():
    """What docs/forecasters.md says of it; TaylorSeer is."""

    def predict(state, features):
        for feature in features:
            state.mark_step_begin()
            state.update(feature)
        state.mark_step_begin()
        return state.approximate()

    for make, linear in ((TaylorSeerState, True), (DMDState, False)):
        one, other = torch.randn(2, 6, 1, 8, dtype=torch.float64)
        apart = predict(make(), one) + predict(make(), other)
        assert torch.allclose(predict(make(), one + other), apart) == linear


def test_diffusers_refuses_a_cache_of_ones_own():
    @dataclasses.dataclass
    class Mine:
        pass

    with pytest.raises(ValueError, match="not supported"):
        tiny.pipeline().transformer.enable_cache(Mine())


def test_diffusers_caches_are_told_their_branch_or_fail():
    transformer = tiny.pipeline().transformer
    transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="context"):
        transformer.transformer_blocks[0].attn(torch.ones(1, 4, 32))


def test_cache_dit_tells_branches_by_the_order_of_calls():
    context = CachedContext(cache_config=cache_dit.DBCacheConfig(enable_separate_cfg=True, num_inference_steps=4))
    seen = []
    for _ in range(4):
        context.mark_step_begin()
        seen.append(context.is_separate_cfg_step())
    assert seen == [False, True, False, True]


def test_magcache_calibrates_its_ratios_and_wants_the_number_of_steps():
    fields = {field.name for field in dataclasses.fields(MagCacheConfig)}
    assert {"calibrate", "mag_ratios", "num_inference_steps"} <= fields
    assert "calibrate" not in {field.name for field in dataclasses.fields(FirstBlockCacheConfig)}


def test_cache_dit_registers_this_many_families():
    assert cache_dit.supported_pipelines()[0] == 45


@pytest.mark.parametrize("module", [cache_manager, first_block_cache, mag_cache, taylorseer_cache])
def test_decisions_are_excluded_from_compilation(module):
    assert "@torch.compiler.disable" in inspect.getsource(module)
