"""The TaylorSeer settings of diffusers give the same full steps, and the same images where whole blocks are cached."""

import re

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    LTXVideoTransformer3DModel,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.hooks import taylorseer_cache
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lesa
from tests.lesa.adapters.diffusers.tiny import STEPS, arguments, pipeline
from tests.lesa.strategies import schedule

BLOCKS = [r"^transformer_blocks\.\d+$", r"^single_transformer_blocks\.\d+$"]


class Counted(nn.Module, CacheMixin):
    """A module that diffusers hooks, with a list of the steps at which it ran."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(1, 1)})])
        self.ran = []
        self.step = -1
        linear = self.blocks[0]["attn"]
        linear.forward = lambda x: self.ran.append(self.step) or x

    def forward(self, x):
        self.step += 1
        return self.blocks[0]["attn"](x)


configs = st.builds(
    TaylorSeerCacheConfig,
    cache_interval=st.integers(1, 8),
    disable_cache_before_step=st.integers(1, 8),
    disable_cache_after_step=st.none() | st.integers(0, 30),
    max_order=st.integers(0, 3),
)


@given(configs, st.integers(1, 30))
def test_the_full_steps_equal_those_of_diffusers(config, steps):
    model = Counted()
    model.enable_cache(config)
    with model.cache_context("cond"):
        for _ in range(steps):
            model(torch.ones(1))
    forecaster, plan = lesa.from_taylorseer_config(config)
    assert plan(schedule(steps)) == lesa.StepPlan(steps, model.ran)
    assert forecaster == lesa.Taylor(config.max_order)


def double_pipeline(seed=0):
    """The tiny pipeline with a float64 transformer."""
    made = pipeline(seed)
    made.transformer.double()
    return made


def double_arguments(**options):
    """The arguments of a call in float64."""
    return {k: v.double() if torch.is_tensor(v) else v for k, v in arguments(**options).items()}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_equal_those_of_diffusers_if_whole_blocks_are_cached(order, guidance):
    config = TaylorSeerCacheConfig(
        cache_interval=3, max_order=order, taylor_factors_dtype=torch.float64, cache_identifiers=BLOCKS
    )
    theirs, ours = double_pipeline(), double_pipeline()
    theirs.transformer.enable_cache(config)
    expected = theirs(**double_arguments(guidance=guidance)).images
    with lesa.enable(ours, *lesa.from_taylorseer_config(config)) as handle:
        made = ours(**double_arguments(guidance=guidance)).images
    assert {tuple(record.full) for record in handle.records} == {(0, 1, 2, 4, 7)}
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    assert (expected - double_pipeline()(**double_arguments(guidance=guidance)).images).abs().max() > 1e-6


@pytest.mark.parametrize("mode", [{}, {"use_lite_mode": True}], ids=["attention", "lite"])
def test_images_are_close_to_those_of_diffusers_in_other_modes(mode):
    config = TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float64, **mode)
    theirs, ours, full = double_pipeline(), double_pipeline(), double_pipeline()(**double_arguments()).images
    ran = []
    theirs.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: ran.append(None))
    theirs.transformer.enable_cache(config)
    expected = theirs(**double_arguments()).images
    with lesa.enable(ours, *lesa.from_taylorseer_config(config)) as handle:
        made = ours(**double_arguments()).images
    assert len(handle.records[0].full) == len(ran) < STEPS
    # both predict the same image, and differ less than the sum of their errors
    errors = [(image - full).norm() for image in (made, expected)]
    assert 0 < (made - expected).norm() < sum(errors)


@pytest.mark.parametrize("kind", [WanTransformer3DModel, LTXVideoTransformer3DModel])
def test_the_patterns_of_diffusers_match_no_attention_of_some_models(kind):
    """docs/taylorseer.md says so."""
    with torch.device("meta"):
        names = [name for name, _ in kind(num_layers=1).named_modules()]
    assert any(name.endswith("attn1") for name in names)
    patterns = taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
    assert not any(re.fullmatch(pattern, name) for pattern in patterns for name in names)


def test_configs_that_fail_in_diffusers_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        lesa.from_taylorseer_config(TaylorSeerCacheConfig(disable_cache_before_step=0))
    with pytest.raises(ValueError, match="not a FirstBlockCacheConfig"):
        lesa.from_taylorseer_config(FirstBlockCacheConfig())
