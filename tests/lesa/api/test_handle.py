"""The handle of an enabled pipeline: records, summary, log messages and warnings."""

import logging
import types

import pytest
import torch

import lesa
from lesa import LesaWarning, Reuse, Taylor
from lesa.runtime import record as record_module
from tests.lesa.adapters.diffusers.probes import PLAN, call_at
from tests.lesa.adapters.diffusers.tiny import STEPS, generate
from tests.lesa.strategies import schedule

FEATURE = 2 * 16 * 32 * 4  # bytes: batch x tokens x channels x float32


def test_kept_bytes_are_the_size_of_the_features_needed_at_the_same_time(pipeline):
    for forecaster, features in ((Reuse(), 1), (Taylor(1), 2), (Taylor(2), 3)):
        with lesa.enable(pipeline, forecaster, PLAN) as handle:
            generate(pipeline)
        assert handle.records[0].kept_bytes == features * FEATURE


def test_the_summary_has_the_steps_bytes_and_times_of_each_branch(pipeline, monkeypatch):
    now = [0.0]  # a clock that moves by 5 ms in each of the 4 blocks, and by 1 ms each time it is read

    def moved(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(record_module, "time", types.SimpleNamespace(perf_counter=lambda: moved(0.001)))
    for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks):
        block.register_forward_hook(lambda *_: moved(0.005) and None)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        assert handle.summary() == "no generation yet"
        generate(pipeline, guidance=3.0)
    lines = handle.summary().splitlines()
    assert [line.split(":")[0] for line in lines] == ["transformer (cond)", "transformer (uncond)"]
    for line in lines:
        assert "4 full and 6 predicted steps, 2.50x ideal, 0.0 MiB kept" in line
        assert line.endswith("full: 0, 1, 4, 7 (21 ms each); predicted: 2, 3, 5, 6, 8, 9 (1 ms each)")


def test_the_memory_is_logged_before_the_first_step_and_when_it_is_allocated(pipeline, caplog):
    seen = []
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(len(caplog.messages)))
    with caplog.at_level(logging.INFO, "lesa"), lesa.enable(pipeline, Taylor(2), PLAN):
        generate(pipeline)
    plan, allocated = caplog.messages
    assert plan == "transformer (cond): ##..#..#.. (# full, . predicted); at most 3 features are kept"
    assert allocated == f"transformer (cond): keeps {3 * FEATURE / 2**20:.1f} MiB of features"
    assert seen == [1, 2, 2, 2]


def remove_head_hooks(pipeline):
    """Remove the hooks that record features, so that nothing can be predicted."""
    pipeline.transformer.norm_out._forward_pre_hooks.clear()


def test_a_generation_without_predicted_steps_gives_a_warning_with_the_cause(pipeline):
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        remove_head_hooks(pipeline)
        with pytest.warns(LesaWarning, match=r"no step of transformer \(cond\) was predicted although 6 of the 10"):
            generate(pipeline)
        assert (
            "predicted: none (- each); not predicted: 2, 3, 5, 6, 8, 9 (no feature reached its head)"
        ) in handle.summary()
    with lesa.enable(pipeline, Taylor(1), PLAN, strict=True):
        remove_head_hooks(pipeline)
        with pytest.raises(RuntimeError, match="no feature reached its head"):
            generate(pipeline)
    generate(pipeline)


def test_shapes_that_change_at_every_step_are_named_as_the_cause(pipeline):
    times = schedule(STEPS)
    with torch.no_grad(), lesa.enable(pipeline.transformer, Taylor(1), PLAN, times=times) as handle:
        for step in range(STEPS - 1):
            call_at(pipeline.transformer, times[step], batch=1 + step % 2)
        with pytest.warns(LesaWarning, match="were to be: the shapes of its inputs changed"):
            call_at(pipeline.transformer, times[STEPS - 1])
        assert handle.records[0].full == list(range(STEPS))


def test_a_plan_without_predicted_steps_gives_no_warning(pipeline):
    with lesa.enable(pipeline, Reuse(), lesa.StepPlan(10, range(10)), strict=True) as handle:
        generate(pipeline)
    assert handle.records[0].unplanned == {}
