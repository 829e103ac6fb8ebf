"""Predictions: with true features nothing changes, and both paths predict by the table of the forecaster."""

import pytest
import torch
from torch import nn

import lesa
from lesa import LesaConfig, LesaPredictor, Reuse, Taylor
from lesa.adapters.diffusers import Attachment
from lesa.adapters.diffusers.output_heads import OUTPUT_HEADS
from tests.lesa.adapters.diffusers.probes import PLAN, BlockRuns, Oracle, record
from tests.lesa.adapters.diffusers.tiny import STEPS, generate


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_predictions_with_true_features_equal_full_steps_and_run_no_block(pipeline, predicted_path, guidance):
    untouched = generate(pipeline, guidance=guidance)
    features, recorded = record(pipeline, guidance=guidance)
    assert torch.equal(untouched, recorded)
    runs = BlockRuns(pipeline.transformer)
    generate(pipeline, guidance=guidance)
    every_step, runs.count = runs.count, 0
    with Attachment(pipeline, Oracle(features, PLAN)):
        result = generate(pipeline, guidance=guidance)
    if predicted_path == "blocks skipped":
        assert torch.equal(result, untouched)
    else:  # the fused output head adds in another order
        torch.testing.assert_close(result, untouched, rtol=1e-5, atol=1e-5)
    assert runs.count == every_step * len(PLAN.full_steps) / STEPS


def test_a_predictor_with_a_kan_on_the_features_predicts_its_closed_loop(pipeline, blocks_skipped):
    predictor = LesaPredictor(LesaConfig(STEPS, hidden_dim=8, latent="kan"))
    for layer in predictor.latent:
        torch.nn.init.normal_(layer.spline_weight, std=0.1)
    seen, norm = [], pipeline.transformer.norm_out
    with lesa.enable(pipeline, predictor, PLAN) as handle, torch.no_grad():
        norm.forward, forward = lambda x, *a: (seen.append(x.clone()), forward(x, *a))[1], norm.forward
        generate(pipeline)
        del norm.forward
        assert handle.records[0].predicted == list(PLAN.predicted_steps)
        for step in PLAN.predicted_steps:
            times = pipeline.scheduler.sigmas
            expected = predictor(torch.stack(seen[:step]), times, times[step])
            torch.testing.assert_close(seen[step], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(2), "lesa"])
def test_predicted_features_follow_the_table(pipeline, blocks_skipped, forecaster):
    if forecaster == "lesa":
        forecaster = LesaPredictor(LesaConfig(STEPS, hidden_dim=8))
    seen = []
    norm = pipeline.transformer.norm_out
    with lesa.enable(pipeline, forecaster, PLAN):
        norm.forward, forward = lambda x, *a: (seen.append(x.clone()), forward(x, *a))[1], norm.forward
        generate(pipeline)
        del norm.forward
        table = forecaster.table(PLAN, pipeline.scheduler.sigmas)
    full = torch.stack([seen[step] for step in PLAN.full_steps]).double()
    for row, bias, step in zip(table.coefficients, table.bias, PLAN.predicted_steps, strict=True):
        expected = torch.einsum("j,j...->...", row, full) + bias
        torch.testing.assert_close(seen[step].double(), expected, rtol=1e-4, atol=1e-5)


def test_both_paths_through_a_predicted_step_give_the_same_images(pipeline, monkeypatch):
    with lesa.enable(pipeline, Taylor(1), PLAN):
        precomputed = generate(pipeline, guidance=3.0)
    monkeypatch.delitem(OUTPUT_HEADS, "FluxTransformer2DModel")
    with lesa.enable(pipeline, Taylor(1), PLAN):
        torch.testing.assert_close(generate(pipeline, guidance=3.0), precomputed)


def test_invalid_arguments_of_enable_raise_and_change_nothing(pipeline):
    transformer = pipeline.transformer
    with pytest.raises(ValueError, match="which steps are full"):
        lesa.enable(pipeline, Reuse())
    with pytest.raises(ValueError, match="StepPlan or a function"):
        lesa.enable(pipeline, Reuse(), [0, 5])
    with pytest.raises(ValueError, match="made for 20 steps"):
        lesa.enable(pipeline, LesaPredictor(LesaConfig(20, hidden_dim=4)), PLAN)
    with pytest.raises(ValueError, match="no list of blocks"):
        lesa.enable(WithoutBlocks(), Reuse(), PLAN)
    with pytest.raises(ValueError, match="no final norm"):
        lesa.enable(nn.Linear(2, 2), Reuse(), PLAN)
    with pytest.raises(ValueError, match="has no transformer"):
        lesa.enable(object(), Reuse(), PLAN)
    with pytest.raises(ValueError, match="from its scheduler"):
        lesa.enable(pipeline, Reuse(), PLAN, times=[1.0, 0.5])
    with lesa.enable(pipeline, Reuse(), PLAN), pytest.raises(ValueError, match="already enabled on transformer"):
        lesa.enable(pipeline, Reuse(), PLAN)
    with (
        lesa.enable(pipeline, {("transformer", "other"): Reuse()}, PLAN),
        pytest.raises(ValueError, match=r"no forecaster for \('transformer', 'cond'\)"),
    ):
        generate(pipeline)
    assert type(transformer).__call__ is nn.Module.__call__


class WithoutBlocks(nn.Module):
    """A module with a final norm and without a list of blocks."""

    def __init__(self):
        super().__init__()
        self.norm_out = nn.LayerNorm(4)

    def forward(self, hidden_states, timestep):
        return self.norm_out(hidden_states)
