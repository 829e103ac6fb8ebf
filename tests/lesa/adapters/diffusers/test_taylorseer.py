"""The settings of diffusers' TaylorSeer, against its own hook."""

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
    """A module that diffusers hooks, and the steps at which it really ran."""

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
def test_the_full_steps_are_those_that_diffusers_runs(config, steps):
    model = Counted()
    model.enable_cache(config)
    with model.cache_context("cond"):
        for _ in range(steps):
            model(torch.ones(1))
    forecaster, plan = lesa.from_taylorseer_config(config)
    assert plan(schedule(steps)) == lesa.StepPlan(steps, model.ran)
    assert forecaster == lesa.Taylor(config.max_order)


def double(seed=0):
    made = pipeline(seed)
    made.transformer.double()
    return made


def in_double(**options):
    return {k: v.double() if torch.is_tensor(v) else v for k, v in arguments(**options).items()}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_whole_blocks_cached_the_images_equal_those_of_diffusers(order, guidance):
    config = TaylorSeerCacheConfig(
        cache_interval=3, max_order=order, taylor_factors_dtype=torch.float64, cache_identifiers=BLOCKS
    )
    theirs, ours = double(), double()
    theirs.transformer.enable_cache(config)
    expected = theirs(**in_double(guidance=guidance)).images
    with lesa.enable(ours, *lesa.from_taylorseer_config(config)) as handle:
        made = ours(**in_double(guidance=guidance)).images
    assert {tuple(record.full) for record in handle.records} == {(0, 1, 2, 4, 7)}
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    assert (expected - double()(**in_double(guidance=guidance)).images).abs().max() > 1e-6


@pytest.mark.parametrize("mode", [{}, {"use_lite_mode": True}], ids=["attention", "lite"])
def test_with_other_settings_the_same_steps_are_full_and_images_are_close(mode):
    config = TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float64, **mode)
    theirs, ours, full = double(), double(), double()(**in_double()).images
    ran = []
    theirs.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: ran.append(None))
    theirs.transformer.enable_cache(config)
    expected = theirs(**in_double()).images
    with lesa.enable(ours, *lesa.from_taylorseer_config(config)) as handle:
        made = ours(**in_double()).images
    assert len(handle.records[0].full) == len(ran) < STEPS
    # both are predictions of the same image, as far from each other as from the image itself at most
    errors = [(image - full).norm() for image in (made, expected)]
    assert 0 < (made - expected).norm() < sum(errors)


@pytest.mark.parametrize("kind", [WanTransformer3DModel, LTXVideoTransformer3DModel])
def test_diffusers_own_patterns_match_no_attention_of_some_models(kind):
    """What docs/taylorseer.md says of them."""
    with torch.device("meta"):
        names = [name for name, _ in kind(num_layers=1).named_modules()]
    assert any(name.endswith("attn1") for name in names)
    patterns = taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
    assert not any(re.fullmatch(pattern, name) for pattern in patterns for name in names)


def test_configurations_that_fail_in_diffusers_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        lesa.from_taylorseer_config(TaylorSeerCacheConfig(disable_cache_before_step=0))
    with pytest.raises(ValueError, match="not a FirstBlockCacheConfig"):
        lesa.from_taylorseer_config(FirstBlockCacheConfig())
