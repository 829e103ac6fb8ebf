import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lesa import GramMatrix, LeastSquares, StepPlan
from lesa.calibration import gram as gram_module
from lesa.calibration.errors import ErrorGram
from lesa.forecasters.least_squares import relative_error
from lesa.runtime.guard import make_probes
from tests.lesa.strategies import plans, schedule


def filled(features, channels=None):
    gram = GramMatrix(features.shape[1], channels=channels)
    for step in range(features.shape[1]):
        gram.update(step, features[:, step])
    return gram


def test_entries_are_inner_products_with_a_row_for_the_constant():
    features = torch.randn(3, 4, 2, 5)
    flat = features.transpose(0, 1).flatten(1).double()
    flat = torch.cat([flat, torch.ones(1, flat.shape[1])])
    torch.testing.assert_close(filled(features).matrix, flat @ flat.T)
    assert filled(features).count == 30


def test_batches_add_up_and_so_do_machines():
    a, b = torch.randn(3, 4, 5), torch.randn(2, 4, 5)
    together = filled(torch.cat([a, b]))
    one_by_one, elsewhere = filled(a), filled(b)
    one_by_one.merge(elsewhere)
    torch.testing.assert_close(one_by_one.matrix, together.matrix)
    with pytest.raises(ValueError, match="merge"):
        together.merge(GramMatrix(5))


def test_a_batch_that_is_broken_off_leaves_the_matrix_as_it_was():
    gram = filled(torch.randn(3, 4, 5))
    before = gram.matrix.clone()
    gram.update(0, torch.randn(3, 5))
    gram.update(1, torch.randn(3, 5))
    assert torch.equal(gram.matrix, before)
    for step in range(4):
        gram.update(step, torch.randn(3, 5))
    assert gram.count == 30


def test_wrong_use_is_an_error_that_changes_nothing():
    gram = GramMatrix(4)
    gram.update(0, torch.randn(5))
    with pytest.raises(ValueError, match="does not follow"):
        gram.update(2, torch.randn(5))
    with pytest.raises(ValueError, match="elements"):
        gram.update(1, torch.randn(6))
    with pytest.raises(ValueError, match="NaN"):
        gram.update(1, torch.tensor([1.0, float("nan"), 0, 0, 0]))
    with pytest.raises(ValueError, match="empty"):
        gram.solve([0], 1)
    with pytest.raises(ValueError, match="5 steps"):
        gram.error(StepPlan(5, [0]))
    assert not gram.matrix.any()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_plan_of_another_number_of_steps_is_refused(per_channel):
    forecaster = LeastSquares(filled(torch.randn(3, 8, 5), channels=5), per_channel=per_channel)
    with pytest.raises(ValueError, match="the plan has 6 steps, this matrix 8"):
        forecaster.table(StepPlan(6, [0, 2]), schedule(6))


def test_error_is_the_mean_squared_error_of_least_squares():
    features = torch.randn(50, 6, 4, dtype=torch.float64).cumsum(1)
    gram, plan = filled(features), StepPlan(6, [0, 3])
    table = LeastSquares(gram).table(plan, schedule(6))
    full = features[:, list(plan.full_steps)]
    error = gram.error(plan)
    for row, bias, step in zip(table.coefficients, table.bias, plan.predicted_steps, strict=True):
        made = torch.einsum("j,bjd->bd", row, full) + bias
        torch.testing.assert_close(error[step], (made - features[:, step]).square().mean(), rtol=1e-4, atol=0)
    assert error[0] == error[3] == 0


def test_save_and_load(tmp_path):
    gram = filled(torch.randn(3, 4, 5))
    gram.save(tmp_path / "gram.safetensors")
    assert torch.equal(GramMatrix.load(tmp_path / "gram.safetensors").matrix, gram.matrix)
    whole = (tmp_path / "gram.safetensors").read_bytes()
    (tmp_path / "gram.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="not a complete Gram matrix"):
        GramMatrix.load(tmp_path / "gram.safetensors")


def test_the_error_of_a_table_is_that_of_its_predictions_and_a_limit_adds_to_it():
    features = torch.randn(50, 8, 4, dtype=torch.float64).cumsum(1)
    gram, plan = filled(features), StepPlan(8, [0, 1, 2, 5])
    table = LeastSquares(gram).table(plan, schedule(8))
    torch.testing.assert_close(gram.table_error(table), gram.error(plan))
    limited = table.limited(2)
    made = torch.einsum("sj,bjd->bsd", limited.coefficients, features[:, list(plan.full_steps)])
    made += limited.bias[:, None]
    expected = (made - features[:, list(plan.predicted_steps)]).square().mean((0, 2))
    torch.testing.assert_close(gram.table_error(limited)[list(plan.predicted_steps)], expected)
    assert gram.table_error(limited).sum() > gram.table_error(table).sum()
    with pytest.raises(ValueError, match="empty"):
        GramMatrix(8).table_error(table)


def smooth(seed, samples=4, steps=8, channels=3, dtype=torch.float64):
    """Features [samples, steps, 5, channels] whose channels move in ways of their own, around large constants."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None]
    speed = torch.linspace(0.5, 6, channels, dtype=torch.float64)
    a, b, noise = torch.randn(3, samples, 1, 5, channels, generator=generator, dtype=torch.float64)
    path = 3 + a * torch.sin(speed * t) + b * torch.cos(2 * speed * t)
    return (path + 0.01 * noise * torch.randn(samples, steps, 5, channels, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_channels_are_inner_products_of_their_own_and_add_up_to_the_plain_matrix(dtype, monkeypatch):
    monkeypatch.setattr(gram_module, "CHUNK", 3 * 8 * 2)  # 3 of 20 tokens at once
    monkeypatch.setattr(gram_module, "CHANNELS", 2)  # of 5
    features = smooth(0, channels=5, dtype=dtype)
    gram = filled(features, channels=5)
    rows = features.double().permute(3, 1, 0, 2).flatten(2)  # [channels, steps, samples x tokens]
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    torch.testing.assert_close(gram.by_channel, rows @ rows.mT)
    torch.testing.assert_close(gram.by_channel.sum(0), gram.matrix)
    torch.testing.assert_close(gram.matrix, filled(features).matrix, rtol=0, atol=0)


def test_channels_of_batches_and_machines_add_up():
    a, b = smooth(0), smooth(1)
    together, one_by_one = filled(torch.cat([a, b]), channels=3), filled(a, channels=3)
    one_by_one.merge(filled(b, channels=3))
    torch.testing.assert_close(one_by_one.by_channel, together.by_channel)
    for other in (filled(a), GramMatrix(8, channels=4)):
        before = other.matrix.clone()
        with pytest.raises(ValueError, match="channels"):
            other.merge(together)
        assert torch.equal(other.matrix, before)


@pytest.mark.parametrize("end", ["broken off", "NaN", "an error at the last step"])
def test_a_batch_that_does_not_end_leaves_all_channels_as_they_were(end, monkeypatch):
    features = smooth(0)
    gram = filled(features, channels=3)
    matrix, channels = gram.matrix.clone(), gram.by_channel.clone()
    for step in range(7):
        gram.update(step, features[:, step])
    if end == "NaN":
        with pytest.raises(ValueError, match="NaN"):
            gram.update(7, features[:, 7] * float("nan"))
    elif end == "an error at the last step":
        monkeypatch.setattr(gram_module, "_products", lambda features: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gram.update(7, features[:, 7])
        monkeypatch.undo()
    assert torch.equal(gram.matrix, matrix)
    assert torch.equal(gram.by_channel, channels)
    for step in range(8):
        gram.update(step, features[:, step])
    torch.testing.assert_close(gram.by_channel, 2 * channels)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 1 channel"):
        GramMatrix(4, channels=0)
    gram = GramMatrix(4, channels=3)
    with pytest.raises(ValueError, match=r"\[2, 4\], not \[..., 3\]"):
        gram.update(0, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"not \[..., 3\]"):
        gram.update(0, torch.tensor(1.0))
    with pytest.raises(ValueError, match="per_channel=True"):
        LeastSquares(GramMatrix(4), per_channel=True)
    with pytest.raises(ValueError, match="empty"):
        LeastSquares(gram, per_channel=True).table(StepPlan(4, [0]), schedule(4))


@given(plans(max_steps=8), st.integers(0, 99), st.booleans())
def test_coefficients_of_each_channel_never_have_a_larger_calibration_error(plan, seed, bias):
    gram = filled(smooth(seed, steps=plan.num_steps), channels=3)
    shared = LeastSquares(gram, bias=bias).table(plan, schedule(plan.num_steps))
    own = LeastSquares(gram, bias=bias, per_channel=True).table(plan, schedule(plan.num_steps))
    used = [*plan.full_steps, plan.num_steps]
    weights = torch.cat([shared.coefficients, shared.bias[:, None]], 1)
    # what the ridge adds to the quantity that both minimise
    slack = 1e-6 * weights.square() @ gram.matrix.diagonal()[used] / gram.count
    steps = list(plan.predicted_steps)
    assert (gram.table_error(own)[steps] <= gram.table_error(shared)[steps] + slack + 1e-9).all()


def test_channels_that_move_in_ways_of_their_own_are_predicted_better():
    gram, plan = filled(smooth(0, samples=16), channels=3), StepPlan(8, [0, 2, 4])
    shared, own = (LeastSquares(gram, per_channel=p).table(plan, schedule(8)) for p in (False, True))
    assert gram.table_error(own).sum() < 0.5 * gram.table_error(shared).sum()


@given(plans(max_steps=8), st.integers(0, 99))
def test_one_channel_alone_has_the_coefficients_that_it_would_share(plan, seed):
    gram = filled(smooth(seed, steps=plan.num_steps, channels=1), channels=1)
    shared, own = (LeastSquares(gram, per_channel=p).table(plan, schedule(plan.num_steps)) for p in (False, True))
    assert own.channels == 1
    torch.testing.assert_close(own.coefficients[..., 0], shared.coefficients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.bias[:, 0], shared.bias, rtol=1e-4, atol=1e-6)


def test_the_error_of_a_table_by_channel_is_that_of_its_predictions():
    features = smooth(0)
    gram, plan = filled(features, channels=3), StepPlan(8, [0, 1, 2, 5])
    forecaster = LeastSquares(gram, per_channel=True)
    for table in (forecaster.table(plan, schedule(8)), forecaster.table(plan, schedule(8)).limited(2)):
        made = torch.einsum("sjd,bjtd->bstd", table.coefficients, features[:, list(plan.full_steps)])
        made += table.bias[:, None]
        steps = list(plan.predicted_steps)
        expected = (made - features[:, steps]).square().mean((0, 2, 3))
        torch.testing.assert_close(gram.table_error(table)[steps], expected)
        torch.testing.assert_close(forecaster.expected_error(table), relative_error(gram, table))
    with pytest.raises(ValueError, match="per_channel=True"):
        filled(features).table_error(table)
    with pytest.raises(ValueError, match="has 3 channels, this matrix 4"):
        filled(smooth(0, channels=4), channels=4).table_error(table)
    with pytest.raises(ValueError, match="sums over channels"):
        ErrorGram.from_gram(gram).errors(table)


def test_a_dead_channel_is_predicted_as_nothing():
    features = smooth(0)
    features[..., 1] = 0
    gram, plan = filled(features, channels=3), StepPlan(8, [0, 3])
    table = LeastSquares(gram, per_channel=True).table(plan, schedule(8))
    assert not table.coefficients[..., 1].any()
    assert not table.bias[:, 1].any()


@pytest.mark.parametrize("plan", [StepPlan(8, [0, 1, 4]), StepPlan(8, [0]), StepPlan(8, range(8))], ids=str)
def test_probes_have_the_channels_of_the_table(plan):
    forecaster = LeastSquares(filled(smooth(0), channels=3), per_channel=True)
    probes = make_probes(lambda other: forecaster.table(other, schedule(8)), plan, forecaster.expected_error)
    for slot, step in enumerate(plan.full_steps[1:], start=1):
        without = StepPlan(8, [full for full in plan.full_steps if full != step])
        table = forecaster.table(without, schedule(8))
        row = without.predicted_steps.index(step)
        torch.testing.assert_close(probes.coefficients[slot, :slot], table.coefficients[row, :slot])
        torch.testing.assert_close(probes.bias[slot], table.bias[row])
    assert set(probes.expected) == set(plan.full_steps[1:])


def test_channels_are_saved_and_loaded(tmp_path):
    gram = filled(smooth(0), channels=3)
    gram.save(tmp_path / "gram.safetensors")
    read = GramMatrix.load(tmp_path / "gram.safetensors")
    assert torch.equal(read.matrix, gram.matrix)
    torch.testing.assert_close(read.by_channel, gram.by_channel, rtol=1e-14, atol=0)
    assert torch.equal(read.by_channel, read.by_channel.mT)
    filled(smooth(0)).save(tmp_path / "plain.safetensors")
    assert GramMatrix.load(tmp_path / "plain.safetensors").channels is None


GOOD = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": GOOD},
        {"gram": GOOD[:2]},
        {"gram": GOOD[0]},
        {"gram": GOOD[:1, :1]},
        {"gram": GOOD.float()},
        {"gram": GOOD * float("nan")},
        {"gram": GOOD + torch.ones(3, 3).triu(1)},
        {"gram": GOOD, "channels": torch.ones(2, 5, dtype=torch.float64)},
        {"gram": GOOD, "channels": torch.ones(0, 6, dtype=torch.float64)},
        {"gram": GOOD, "channels": torch.full((2, 6), float("inf"), dtype=torch.float64)},
    ],
    ids=str,
)
def test_a_file_that_holds_no_gram_matrix_is_refused_by_its_name(tensors, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors is not a complete Gram matrix file"):
        GramMatrix.load(tmp_path / "odd.safetensors")
