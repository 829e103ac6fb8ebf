"""Training in two stages: first on true features, then on the predictor's own predictions."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lesa.training.checkpoint as checkpoint
import lesa.training.two_stage as training
from lesa import LeastSquares, LesaConfig, Reuse, StepPlan, Trajectories, fit
from tests.lesa.strategies import gram_of, schedule

STEPS = 12
PLAN = StepPlan(STEPS, [0, 1, 5, 9])
CONFIG = LesaConfig(STEPS, hidden_dim=8, history=4)
STREAM = ("transformer", "cond")


def smooth(samples=16, size=6, seed=1):
    """Curved trajectories, which reuse of the last feature does not predict well."""
    generator = torch.Generator().manual_seed(seed)
    t = schedule(STEPS)[:-1, None].float()
    start, slope, bend = torch.randn(3, samples, 1, size, generator=generator)
    return Trajectories(schedule(STEPS), [{STREAM: start + slope * t + 2 * bend * t**2}])


def error(forecaster, trajectories):
    """Mean absolute error of the predicted steps."""
    table = forecaster.table(PLAN, trajectories.times)
    features = trajectories.shards[0][STREAM].double()
    full, true = features[:, list(PLAN.full_steps)], features[:, list(PLAN.predicted_steps)]
    made = torch.einsum("sj,bjd->bsd", table.coefficients, full) + table.bias[:, None]
    return float((made - true).abs().mean())


def test_a_fitted_predictor_has_less_than_half_the_error_of_reuse():
    trajectories, unseen = smooth(), smooth(seed=2)
    predictor = fit(trajectories, PLAN, CONFIG, epochs=(10, 20), progress=False)
    ours = error(predictor, unseen)
    assert ours < 0.5 * error(Reuse(), unseen)
    assert ours > error(LeastSquares(gram_of(trajectories)), unseen)  # the best linear forecaster on these features
    assert torch.equal(predictor.schedule, trajectories.times)
    assert len(predictor.losses["guided"]) == 40
    assert len(predictor.losses["closed loop"]) == 80
    assert predictor.losses["closed loop"][-1] < predictor.losses["closed loop"][0]


def test_the_seed_determines_the_predictor():
    a, b, c = (fit(smooth(), PLAN, CONFIG, epochs=(1, 1), seed=s, progress=False).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_an_interrupted_fit_resumes_to_the_same_predictor(tmp_path, monkeypatch):
    whole = fit(smooth(), PLAN, CONFIG, epochs=(1, 2), progress=False)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_SECONDS", 0.0)
    train_on, calls = training.train_on, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return train_on(*args, **kwargs)

    monkeypatch.setattr(training, "train_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(smooth(), PLAN, CONFIG, epochs=(1, 2), checkpoint=tmp_path / "state.safetensors", progress=False)
    monkeypatch.setattr(training, "train_on", train_on)
    resumed = fit(smooth(), PLAN, CONFIG, epochs=(1, 2), checkpoint=tmp_path / "state.safetensors", progress=False)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert resumed.losses == whole.losses


def test_a_checkpoint_that_is_damaged_or_of_another_training_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    fit(smooth(), PLAN, CONFIG, epochs=(1, 1), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="other arguments"):
        fit(smooth(), PLAN, CONFIG, epochs=(1, 2), checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a complete training checkpoint"):
        fit(smooth(), PLAN, CONFIG, epochs=(1, 1), checkpoint=path, progress=False)


def test_invalid_input_is_refused_before_training():
    with pytest.raises(ValueError, match="same number of steps"):
        fit(smooth(), StepPlan(10, [0]), CONFIG)
    with pytest.raises(ValueError, match="nothing to learn"):
        fit(smooth(), StepPlan(STEPS, range(STEPS)), CONFIG)
    features = smooth().shards[0][STREAM].clone()
    features[3, 4, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fit(Trajectories(schedule(STEPS), [{STREAM: features}]), PLAN, CONFIG, progress=False)


def test_one_of_several_streams_has_to_be_chosen():
    shard = {("transformer", "cond"): torch.randn(4, STEPS, 3), ("transformer", "uncond"): torch.randn(4, STEPS, 3)}
    both = Trajectories(schedule(STEPS), [shard])
    with pytest.raises(ValueError, match="choose one"):
        fit(both, PLAN, CONFIG)
    fit(both, PLAN, CONFIG, stream=("transformer", "uncond"), epochs=(1, 0), progress=False)
    with pytest.raises(ValueError, match="was not recorded"):
        fit(both, PLAN, CONFIG, stream=("transformer", "other"))


def test_a_checkpoint_is_one_safetensors_file_and_others_are_refused(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    fit(smooth(), PLAN, CONFIG, epochs=(1, 0), checkpoint=path, progress=False)
    with safe_open(path, "pt") as file:
        assert {"model.latent.0.weight", "optimizer.0.exp_avg"} <= set(file.keys())
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="checkpoint"):
        fit(smooth(), PLAN, CONFIG, checkpoint=path)


def test_bf16_features_train_float32_parameters():
    exact, unseen = smooth(), smooth(seed=2)
    rounded = Trajectories(exact.times, [{STREAM: exact.shards[0][STREAM].bfloat16()}])
    predictor = fit(rounded, PLAN, CONFIG, epochs=(3, 5), progress=False)
    assert {p.dtype for p in predictor.parameters()} == {torch.float32}
    assert error(predictor, unseen) < 1.1 * error(fit(exact, PLAN, CONFIG, epochs=(3, 5), progress=False), unseen)
