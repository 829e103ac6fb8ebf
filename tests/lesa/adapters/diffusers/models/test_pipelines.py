"""Pipelines of diffusers with their own schedulers and guidance."""

from typing import Any

import diffusers
import pytest
import torch

import lesa
from lesa import StepPlan, Taylor
from lesa.adapters.diffusers import Attachment
from tests.lesa.adapters.diffusers.models.check import Oracle, Recorder
from tests.lesa.adapters.diffusers.models.pipelines import PIPELINES, STEPS

PLAN = StepPlan(STEPS, [0, 1, 4])
INSTALLED = [name for name in PIPELINES if hasattr(diffusers, name.split(":")[0])]


def generate(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    """The result of a call with a fixed seed."""
    torch.manual_seed(0)
    return torch.as_tensor(pipeline(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0])


@pytest.mark.parametrize("name", INSTALLED)
def test_a_pipeline_with_true_features_gives_the_result_without_lesa(name, blocks_skipped_in_all_models):
    pipeline, call = PIPELINES[name]()
    untouched, recorder = generate(pipeline, call), Recorder()
    with Attachment(pipeline, recorder):
        assert torch.equal(generate(pipeline, call), untouched)
    plan = StepPlan(STEPS, {*PLAN.full_steps, _skipped(call)})
    with Attachment(pipeline, Oracle(plan, recorder.features)):
        assert torch.equal(generate(pipeline, call), untouched)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_pipeline_predicts_the_planned_steps_and_is_repeatable(name, support):
    pipeline, call = PIPELINES[name]()
    untouched = generate(pipeline, call)
    with lesa.enable(pipeline, Taylor(1), PLAN) as handle:
        first = generate(pipeline, call)
        assert bool(first.isfinite().all())
        assert not torch.equal(first, untouched)
        components = {record.component for record in handle.records}
        for branch in {record.branch for record in handle.records}:
            records = [record for record in handle.records if record.branch == branch]
            firsts = {
                min(record.full) for record in records
            }  # the first step of each transformer, which is always full
            predicted = sorted(step for record in records for step in record.predicted)
            full = sorted(step for record in records for step in record.full)
            assert predicted == [s for s in PLAN.predicted_steps if s >= _skipped(call) and s not in firsts]
            assert sorted(full + predicted) == list(range(_skipped(call), STEPS))
        assert torch.equal(generate(pipeline, call), first)
    assert torch.equal(generate(pipeline, call), untouched)
    for component in components:
        row = support.setdefault(type(getattr(pipeline, component)).__name__, {})
        row["pipelines"] = sorted({*row.get("pipelines", []), name})


def _skipped(call: dict[str, Any]) -> int:
    """The number of first steps that image to image skips."""
    return STEPS - int(STEPS * call.get("strength", 1.0))
