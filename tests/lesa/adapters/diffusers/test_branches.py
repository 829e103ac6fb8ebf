"""Branches of guidance and several transformers: each has its own state, with and without names."""

import copy
from contextlib import nullcontext

import pytest
import torch

import lesa
from lesa import LesaWarning, Reuse, Taylor
from lesa.adapters.diffusers import Attachment
from lesa.adapters.diffusers.recorder import Observer
from tests.lesa.adapters.diffusers.guided import Guided
from tests.lesa.adapters.diffusers.probes import PLAN, record
from tests.lesa.adapters.diffusers.tiny import STEPS, generate

PARTS = [range(STEPS), range(3, STEPS), range(6), range(2, 8)]


@pytest.mark.parametrize("guided", PARTS, ids=["always", "begins late", "ends early", "in the middle"])
@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")], ids=" ".join)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_guidance_may_begin_late_and_end_early(predicted_path, guided, order, named):
    loop, names = Guided(), set()
    with Attachment(loop, Observer(lambda call, feature: names.add((call.branch, loop.branch)))):
        untouched = loop(guided, order, named)
    assert len(names) == len({name for name, _ in names}) == 2  # one name for each branch, in any order of calls
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        outputs = loop(guided, order, named)
        assert handle.going_on == []  # all features are freed after the last step
        for _ in range(2):
            for record in handle.records:
                (branch,) = (mine for name, mine in names if name == record.branch)
                plan = PLAN if branch == "cond" else PLAN.starting_at(guided[0])
                steps = range(STEPS) if branch == "cond" else guided
                assert record.full == [step for step in plan.full_steps if step in steps]
                assert record.predicted == [step for step in plan.predicted_steps if step in steps]
            again = loop(guided, order, named)
    assert all(torch.equal(outputs[key], again[key]) for key in outputs)
    assert all(torch.equal(outputs["cond", step], untouched["cond", step]) for step in (0, 1))


def test_branches_with_new_conditions_at_every_step_are_named_by_call_order(blocks_skipped):
    loop, names = Guided(), set()
    with Attachment(loop, Observer(lambda call, feature: names.add((call.branch, loop.branch)))):
        loop(fresh=True)
    assert names == {("call0", "cond"), ("call1", "uncond")}
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop(fresh=True)
    assert [record.predicted for record in handle.records] == [list(PLAN.predicted_steps)] * 2


def test_controlnet_residuals_are_not_compared_as_conditions(predicted_path):
    loop = Guided()
    loop.new_arguments = lambda: {"controlnet_block_samples": [torch.randn(2, 16, 32)]}
    with lesa.enable(loop, Taylor(1), PLAN) as handle:
        loop()
    assert [record.predicted for record in handle.records] == [list(PLAN.predicted_steps)] * 2


def test_each_transformer_of_a_pipeline_starts_with_a_full_step(predicted_path):
    loop = Guided(transformers=2)
    forecasters = {(name, branch): Taylor(1) for name in loop.components for branch in ("cond", "uncond")}
    with lesa.enable(loop, forecasters, PLAN) as handle:
        first = loop(named=True)
        assert handle.going_on == []
        assert [(r.component, r.branch, r.full, r.predicted) for r in handle.records] == [
            ("transformer", "cond", [0, 1, 4], [2, 3]),
            ("transformer", "uncond", [0, 1, 4], [2, 3]),
            ("transformer_2", "cond", [5, 7], [6, 8, 9]),
            ("transformer_2", "uncond", [5, 7], [6, 8, 9]),
        ]
        second = loop(named=True)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("named", [True, False])
def test_a_scheduler_that_does_not_advance_gives_a_warning(named):
    """Some pipelines call step on copies of their scheduler."""
    loop = Guided()
    loop.stepped_scheduler = copy.deepcopy(loop.scheduler)
    with lesa.enable(loop, Reuse(), PLAN), pytest.warns(LesaWarning, match="was called again at step 0"):
        loop(named=named)
    with (
        lesa.enable(loop, Reuse(), PLAN, strict=True),
        pytest.raises(RuntimeError, match="its scheduler did not advance"),
    ):
        loop(named=named)


def test_guidance_branches_have_their_own_names_and_features(pipeline):
    features, _ = record(pipeline, guidance=3.0)
    assert {branch for branch, _ in features} == {"cond", "uncond"}
    assert not torch.equal(features["cond", 0], features["uncond", 0])


def test_a_pipeline_without_branch_names_has_branches_by_call_order(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.transformer), "cache_context", lambda self, name: nullcontext())
    features, _ = record(pipeline, guidance=3.0)
    assert set(features) == {(f"call{i}", step) for i in (0, 1) for step in range(STEPS)}
    with lesa.enable(
        pipeline, {("transformer", "call0"): Taylor(1), ("transformer", "call1"): Reuse()}, PLAN
    ) as handle:
        generate(pipeline, guidance=3.0)
    assert [(r.branch, r.full) for r in handle.records] == [(f"call{i}", list(PLAN.full_steps)) for i in (0, 1)]
