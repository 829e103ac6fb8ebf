from contextlib import nullcontext

import torch

import lesa
from lesa import Reuse, Taylor
from tests.lesa.adapters.probes import PLAN, record
from tests.lesa.adapters.tiny import STEPS, generate


def test_guidance_branches_have_names_and_features_of_their_own(pipeline):
    features, _ = record(pipeline, guidance=3.0)
    assert {branch for branch, _ in features} == {"cond", "uncond"}
    assert not torch.equal(features["cond", 0], features["uncond", 0])


def test_a_pipeline_that_names_no_branches_gets_them_by_order(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.transformer), "cache_context", lambda self, name: nullcontext())
    features, _ = record(pipeline, guidance=3.0)
    assert set(features) == {(f"call{i}", step) for i in (0, 1) for step in range(STEPS)}
    with lesa.enable(
        pipeline, {("transformer", "call0"): Taylor(1), ("transformer", "call1"): Reuse()}, PLAN
    ) as handle:
        generate(pipeline, guidance=3.0)
    assert [(r.branch, r.full) for r in handle.records] == [(f"call{i}", list(PLAN.full_steps)) for i in (0, 1)]
