"""One predictor for any schedule: gates that measure offsets from fixed times."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lesa
import lesa.calibration.checkpoint as checkpoint
import lesa.calibration.training as training
from lesa import LesaConfig, LesaPredictor, Reuse, StepPlan, Trajectories, fit
from lesa.calibration.interval import interval_error
from tests.lesa.adapters import tiny
from tests.lesa.strategies import plans, schedule
from tests.lesa.test_predictor import closed_loop, trained_size

CONFIG = LesaConfig(anchors=6, hidden_dim=8, history=4)
STREAM = ("transformer", "cond")


def smooth(steps, seed=1, shift=1.15):
    """Trajectories that bend, the same functions of time on every schedule."""
    generator = torch.Generator().manual_seed(seed)
    t = schedule(steps, shift)[:-1, None].float()
    start, slope, bend = torch.randn(3, 16, 1, 6, generator=generator)
    return Trajectories(schedule(steps, shift), [{STREAM: start + slope * t + 2 * bend * t**2}])


def error(forecaster, trajectories, plan):
    table = forecaster.table(plan, trajectories.times)
    features = trajectories.shards[0][STREAM].double()
    full, true = features[:, list(plan.full_steps)], features[:, list(plan.predicted_steps)]
    made = torch.einsum("sj,bjd->bsd", table.coefficients, full) + table.bias[:, None]
    return float((made - true).abs().mean())


def test_a_gate_depends_on_the_time_alone():
    predictor = trained_size(CONFIG)
    a, b = schedule(10), torch.cat([schedule(10)[:5], schedule(40, shift=0.2)[30:]])
    torch.testing.assert_close(predictor.gates(a)[:5], predictor.gates(b)[:5])
    history = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(predictor(history, a, a[4]), predictor(history, b, b[4]))


@given(plans(max_steps=14), st.floats(-1, 2), st.integers(0, 99))
def test_the_table_of_any_schedule_is_the_closed_loop(plan, shift, seed):
    if not plan.predicted_steps:
        return
    predictor, times = trained_size(CONFIG, seed), schedule(plan.num_steps, shift)
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = closed_loop(predictor, plan, times, features)
    table = predictor.table(plan, times)
    made = torch.einsum("sj,j...->s...", table.coefficients, features[list(plan.full_steps)])
    size = float(table.coefficients.abs().sum(1).max() + 1)
    torch.testing.assert_close(made + table.bias[:, None, None], expected, rtol=1e-9, atol=1e-9 * size)


def test_one_training_serves_step_counts_shifts_and_plans_it_has_not_seen():
    lessons = [
        (smooth(12), [StepPlan.paper(12, 3), StepPlan.paper(12, 5)]),
        (smooth(24), [StepPlan.paper(24, 3), StepPlan.paper(24, 6)]),
    ]
    predictor = fit(lessons, None, CONFIG, epochs=(10, 20), progress=False)
    assert predictor.schedule is None
    assert len(predictor.losses["guided"]) == 80
    for steps, shift, interval in ((12, 1.15, 3), (24, 1.15, 6), (18, 1.15, 4), (24, 0.5, 5)):
        unseen, plan = smooth(steps, seed=2, shift=shift), StepPlan.paper(steps, interval)
        assert error(predictor, unseen, plan) < 0.6 * error(Reuse(), unseen, plan)


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_the_error_and_of_several_plans_its_logarithm(several, monkeypatch):
    """So that each plan counts by its relative error: the first update follows the gradient of that."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    gradients = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: gradients.append(
            [p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None]
        ),
    )
    source, plan = smooth(6), StepPlan(6, [0, 1, 2])
    fit([(source, [plan, plan] if several else plan)], None, CONFIG, batch=16, epochs=(1, 0), progress=False)
    torch.manual_seed(0)
    predictor = LesaPredictor(CONFIG)
    true = source.shards[0][STREAM].transpose(0, 1)
    mean = interval_error(predictor, source.times, range(3, 6), true, true, closed=False) / true[3:].numel()
    (mean.log() if several else mean).backward()
    torch.testing.assert_close(gradients[0], [p.grad for p in predictor.parameters() if p.grad is not None])


def test_an_interrupted_training_on_several_schedules_goes_on_to_the_same_predictor(tmp_path, monkeypatch):
    lessons = [(smooth(8), StepPlan.paper(8, 3)), (smooth(12), [StepPlan.paper(12, 3), StepPlan.paper(12, 5)])]
    whole = fit(lessons, None, CONFIG, epochs=(1, 2), progress=False)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_SECONDS", 0.0)
    train_on, calls = training._train_on, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return train_on(*args, **kwargs)

    monkeypatch.setattr(training, "_train_on", interrupted)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(lessons, None, CONFIG, epochs=(1, 2), checkpoint=path, progress=False)
    monkeypatch.setattr(training, "_train_on", train_on)
    resumed = fit(lessons, None, CONFIG, epochs=(1, 2), checkpoint=path, progress=False)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_anchors_are_saved_with_the_predictor(tmp_path):
    predictor = LesaPredictor(LesaConfig(anchors=(1.0, 0.4, 0.1), hidden_dim=4))
    predictor.save_pretrained(tmp_path)
    loaded = LesaPredictor.from_pretrained(tmp_path)
    assert loaded.config == predictor.config
    assert loaded.config.anchors == (1.0, 0.4, 0.1)
    plan = StepPlan(9, [0, 4])
    assert torch.equal(loaded.table(plan, schedule(9)).coefficients, predictor.table(plan, schedule(9)).coefficients)
    assert LesaConfig(anchors=3).anchors == (1.0, 0.5, 0.0)


def test_one_enabled_predictor_follows_the_step_counts_of_a_pipeline():
    pipeline, predictor = tiny.pipeline(), LesaPredictor(CONFIG)
    with lesa.enable(pipeline, predictor, lambda times: StepPlan.paper(len(times) - 1, 3)) as handle:
        for steps in (6, 12):
            tiny.generate(pipeline, steps=steps)
            assert handle.records[0].full == list(StepPlan.paper(steps, 3).full_steps)
    lesa.enable(pipeline, predictor, StepPlan.paper(8, 3)).disable()


def test_what_does_not_fit_is_refused():
    for wrong in ({}, {"num_steps": 10, "anchors": 4}):
        with pytest.raises(ValueError, match="either for a number of steps"):
            LesaConfig(**wrong)
    for anchors in (0, ()):
        with pytest.raises(ValueError, match="anchors"):
            LesaConfig(anchors=anchors)
    two = [(smooth(12), StepPlan.paper(12, 3)), (smooth(12, shift=0.2), StepPlan.paper(12, 3))]
    with pytest.raises(ValueError, match="LesaConfig\\(anchors"):
        fit(two)
    with pytest.raises(ValueError, match="come with the trajectories"):
        fit(two, StepPlan.paper(12, 3), CONFIG)
    with pytest.raises(ValueError, match="same number of steps"):
        fit([(smooth(12), StepPlan.paper(10, 3))], None, CONFIG)
    with pytest.raises(ValueError, match="no plan"):
        fit([(smooth(12), [])], None, CONFIG)
    with pytest.raises(ValueError, match="which steps are full"):
        fit(smooth(12))
