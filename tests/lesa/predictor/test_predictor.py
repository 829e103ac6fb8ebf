"""The LESA predictor: its table, gates and stages, and how it is saved and loaded."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesa import LesaConfig, LesaPredictor, StepPlan
from tests.lesa.predictors import closed_loop, kan_predictor, random_predictor
from tests.lesa.strategies import plans, schedule


@given(
    plans(max_steps=20),
    st.integers(1, 9),
    st.lists(st.floats(0.05, 0.95), max_size=3, unique=True),
    st.floats(-1, 2),
    st.integers(0, 99),
)
def test_the_table_equals_the_closed_loop_to_ten_digits(plan, history, boundaries, shift, seed):
    if not plan.predicted_steps:
        return
    config = LesaConfig(
        plan.num_steps, hidden_dim=8, history=history, boundaries=tuple(sorted(boundaries, reverse=True))
    )
    predictor, times = random_predictor(config, seed), schedule(plan.num_steps, shift)
    features = torch.randn(plan.num_steps, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = closed_loop(predictor, plan, times, features)
    table = predictor.table(plan, times)
    full = features[list(plan.full_steps)]
    made = torch.einsum("sj,j...->s...", table.coefficients, full) + table.bias[:, None, None]
    terms = torch.einsum("sj,j...->s...", table.coefficients.abs(), full.abs()) + table.bias.abs()[:, None, None]
    assert bool(((made - expected).abs() <= 1e-10 * terms + 1e-300).all())


@pytest.mark.parametrize("full", [[0, 2], [0, 3], [0, 1, 2]])
def test_short_schedules_work_with_a_history_shorter_than_the_window(full):
    for steps in (4, 8):
        plan = StepPlan(steps, full)
        table = random_predictor(LesaConfig(steps, hidden_dim=8)).table(plan, schedule(steps))
        assert table.coefficients.shape == (steps - len(full), len(full))


def test_a_short_history_uses_the_weights_of_the_latest_features():
    predictor = random_predictor(LesaConfig(10, hidden_dim=8))
    history, times = torch.randn(3, 5, dtype=torch.float64), schedule(10)
    padded = torch.cat([torch.zeros(5, 5, dtype=torch.float64), history])
    torch.testing.assert_close(predictor(history, times, times[8]), predictor(padded, times, times[8]))
    with pytest.raises(ValueError, match="empty history"):
        predictor([], times, times[8])


def test_a_prediction_equals_the_formula_of_the_paper():
    config = LesaConfig(10, hidden_dim=8)
    predictor, times = random_predictor(config), schedule(10)
    history = torch.randn(9, 4, 6, dtype=torch.float64)
    for stage, (time, window) in enumerate([(times[0], 4), (times[5], 8), (times[9], 8)]):
        assert config.stage(float(time)) == stage
        h, layer = history[-window:], predictor.latent[stage]
        z = torch.einsum("k,k...->...", layer.weight[0], h) + layer.bias
        alpha = predictor.timestep[stage](time - times)
        torch.testing.assert_close(predictor(history, times, time), h[-1] + alpha * z)


def test_a_time_at_a_stage_boundary_belongs_to_the_later_stage():
    config = LesaConfig(10)
    assert [config.stage(t) for t in (1.0, 0.91, 0.9, 0.51, 0.5, 0.0)] == [0, 0, 1, 1, 2, 2]
    assert LesaConfig(10, boundaries=()).stage(1.0) == 0
    assert LesaConfig(10).windows == (4, 8, 8)
    assert LesaConfig(10, history=6, first_history=2, boundaries=(0.5,)).windows == (2, 6)


def test_the_gates_of_all_steps_equal_the_gates_of_single_steps():
    predictor, times = random_predictor(LesaConfig(12, hidden_dim=8)), schedule(12)
    for step, gate in enumerate(predictor.gates(times)):
        stage = predictor.config.stage(float(times[step]))
        torch.testing.assert_close(gate, predictor.timestep[stage](times[step] - times)[0])


def test_a_prediction_is_differentiable():
    predictor, times = random_predictor(LesaConfig(6, hidden_dim=4)), schedule(6)
    history = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: predictor(h, times, times[4]), (history,))
    predictor(history, times, times[4]).sum().backward()
    assert all(p.grad is not None for p in predictor.timestep[predictor.config.stage(float(times[4]))].parameters())


def test_state_dict_has_the_released_keys():
    keys = set(LesaPredictor(LesaConfig(50)).state_dict())
    layers = {
        f"timestep.{e}.layers.{layer}.{name}"
        for e in range(3)
        for layer in range(3)
        for name in ("base_weight", "spline_weight", "spline_scaler", "grid")
    }
    assert keys == layers | {f"latent.{e}.{name}" for e in range(3) for name in ("weight", "bias")}
    predictor = LesaPredictor(LesaConfig(50))
    assert predictor.latent[0].weight.shape == (1, 4)
    assert predictor.latent[2].weight.shape == (1, 8)
    assert predictor.timestep[1].layers[0].base_weight.shape == (256, 51)
    assert predictor.timestep[1].layers[0].grid.shape == (51, 12)
    assert predictor.timestep[1].layers[2].spline_weight.shape == (1, 256, 8)


@pytest.mark.parametrize("latent", ["linear", "kan"])
def test_a_config_gives_the_shapes_of_its_weights_and_checks_them(latent):
    config = LesaConfig(
        7, hidden_dim=5, history=6, first_history=2, boundaries=(0.4,), grid_size=4, spline_order=2, latent=latent
    )
    shapes = {key: tuple(value.shape) for key, value in LesaPredictor(config).state_dict().items() if key != "scale"}
    assert shapes == config.shapes
    config.check_shapes(shapes)
    with pytest.raises(ValueError, match="1 weights are missing"):
        config.check_shapes({key: shape for key, shape in shapes.items() if key != "latent.1.bias"})


def test_a_plan_with_another_number_of_steps_is_refused():
    predictor = LesaPredictor(LesaConfig(10, hidden_dim=8))
    with pytest.raises(ValueError, match="made for 10 steps, the plan has 12"):
        predictor.table(StepPlan(12, [0]), schedule(12))
    with pytest.raises(ValueError, match="10 steps need"):
        predictor.gates(schedule(12))


def test_another_schedule_is_refused_unless_predictor_schedule_is_none():
    predictor, plan = LesaPredictor(LesaConfig(10, hidden_dim=8)), StepPlan(10, [0, 5])
    predictor.schedule = schedule(10)
    predictor.table(plan, schedule(10).float())
    with pytest.raises(ValueError, match="another schedule"):
        predictor.table(plan, schedule(10, shift=0.5))
    predictor.schedule = None
    predictor.table(plan, schedule(10, shift=0.5))


@pytest.mark.parametrize(
    "wrong",
    [{"num_steps": 0}, {"history": 0}, {"first_history": 0}, {"boundaries": (0.5, 0.9)}, {"boundaries": (1.5,)}],
)
def test_invalid_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LesaConfig(**{"num_steps": 10} | wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_predictor_gives_the_same_table(tmp_path, dtype):
    predictor = LesaPredictor(LesaConfig(10, hidden_dim=8, boundaries=(0.9, 0.4))).to(dtype)
    predictor.schedule, predictor.losses = schedule(10), {"guided": [1.0, 0.5]}
    predictor.save_pretrained(tmp_path / "predictor")
    loaded = LesaPredictor.from_pretrained(tmp_path / "predictor")
    assert loaded.config == predictor.config
    assert loaded.losses == predictor.losses
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    plan = StepPlan(10, [0, 5])
    ours, theirs = (p.table(plan, schedule(10)).coefficients for p in (predictor, loaded))
    assert torch.equal(ours, theirs)


def test_damaged_predictor_files_are_refused_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        LesaPredictor.from_pretrained(tmp_path)
    LesaPredictor(LesaConfig(10, hidden_dim=8)).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        LesaPredictor.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["hidden_dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="another configuration"):
        LesaPredictor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        LesaPredictor.from_pretrained(tmp_path)


def test_a_predictor_with_a_kan_on_the_features_starts_as_a_linear_one():
    torch.manual_seed(0)
    kan = LesaPredictor(LesaConfig(10, hidden_dim=8, latent="kan")).double()
    linear = LesaPredictor(LesaConfig(10, hidden_dim=8)).double()
    linear.load_state_dict({k: v for k, v in kan.state_dict().items() if k in linear.state_dict()})
    history, times = torch.randn(9, 4, 6, dtype=torch.float64), schedule(10)
    torch.testing.assert_close(kan(history, times, times[5]), linear(history, times, times[5]))


def test_a_predictor_with_a_kan_on_the_features_has_no_table_but_can_be_saved(tmp_path):
    predictor = kan_predictor()
    with pytest.raises(ValueError, match="has no table"):
        predictor.table(StepPlan(10, [0, 5]), schedule(10))
    predictor.save_pretrained(tmp_path)
    loaded = LesaPredictor.from_pretrained(tmp_path)
    history, times = torch.randn(3, 2, 6, dtype=torch.float64), schedule(10)
    for k in (1, 3):
        assert torch.equal(loaded(history[:k], times, times[8]), predictor(history[:k], times, times[8]))


def test_gates_follow_parameters_that_are_changed_through_data():
    predictor, times = random_predictor(LesaConfig(12, hidden_dim=8)), schedule(12)
    before = predictor.gates(times)
    average = copy.deepcopy(predictor)
    for p in predictor.parameters():
        p.data.mul_(0.5)  # as many weight averages do; this does not increase the tensor's version counter
    assert not torch.allclose(predictor.gates(times), before)
    for ours, theirs in zip(predictor.parameters(), average.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    assert torch.equal(predictor.gates(times), before)


@pytest.mark.gpu
def test_gates_on_a_gpu_follow_changed_parameters():
    predictor, times = LesaPredictor(LesaConfig(50)).cuda(), schedule(50)
    with torch.no_grad():
        for _ in range(2):
            expected = torch.stack([predictor.cpu().gates(times)])[0]
            torch.testing.assert_close(predictor.cuda().gates(times).cpu(), expected, rtol=1e-4, atol=1e-5)
            predictor.timestep[1].layers[0].base_weight.mul_(2)
