"""Gram matrices: inner products of features, least squares errors, and files."""

import pytest
import torch
from safetensors.torch import save_file

from lesa import GramMatrix, LeastSquares, StepPlan
from tests.lesa.strategies import schedule


def gram_of(features):
    """The Gram matrix of features [samples, steps, ...]."""
    gram = GramMatrix(features.shape[1])
    for step in range(features.shape[1]):
        gram.update(step, features[:, step])
    return gram


def test_entries_are_inner_products_with_a_row_for_the_constant_feature():
    features = torch.randn(3, 4, 2, 5)
    flat = features.transpose(0, 1).flatten(1).double()
    flat = torch.cat([flat, torch.ones(1, flat.shape[1])])
    torch.testing.assert_close(gram_of(features).matrix, flat @ flat.T)
    assert gram_of(features).count == 30


def test_merged_matrices_equal_the_matrix_of_all_batches():
    a, b = torch.randn(3, 4, 5), torch.randn(2, 4, 5)
    together = gram_of(torch.cat([a, b]))
    one_by_one, elsewhere = gram_of(a), gram_of(b)
    one_by_one.merge(elsewhere)
    torch.testing.assert_close(one_by_one.matrix, together.matrix)
    with pytest.raises(ValueError, match="merge"):
        together.merge(GramMatrix(5))


def test_an_interrupted_batch_does_not_change_the_matrix():
    gram = gram_of(torch.randn(3, 4, 5))
    before = gram.matrix.clone()
    gram.update(0, torch.randn(3, 5))
    gram.update(1, torch.randn(3, 5))
    assert torch.equal(gram.matrix, before)
    for step in range(4):
        gram.update(step, torch.randn(3, 5))
    assert gram.count == 30


def test_invalid_calls_raise_and_do_not_change_the_matrix():
    gram = GramMatrix(4)
    gram.update(0, torch.randn(5))
    with pytest.raises(ValueError, match="does not follow"):
        gram.update(2, torch.randn(5))
    with pytest.raises(ValueError, match="elements"):
        gram.update(1, torch.randn(6))
    with pytest.raises(ValueError, match="NaN"):
        gram.update(1, torch.tensor([1.0, float("nan"), 0, 0, 0]))
    with pytest.raises(ValueError, match="empty"):
        gram.solve([0], [1])
    with pytest.raises(ValueError, match="5 steps"):
        gram.error(StepPlan(5, [0]))
    assert not gram.matrix.any()


def test_a_plan_with_another_number_of_steps_is_refused():
    forecaster = LeastSquares(gram_of(torch.randn(3, 8, 5)))
    with pytest.raises(ValueError, match="the plan has 6 steps, this matrix 8"):
        forecaster.table(StepPlan(6, [0, 2]), schedule(6))


def test_the_error_of_a_plan_is_the_mean_squared_error_of_least_squares():
    features = torch.randn(50, 6, 4, dtype=torch.float64).cumsum(1)
    gram, plan = gram_of(features), StepPlan(6, [0, 3])
    table = LeastSquares(gram).table(plan, schedule(6))
    full = features[:, list(plan.full_steps)]
    error = gram.error(plan)
    for row, bias, step in zip(table.coefficients, table.bias, plan.predicted_steps, strict=True):
        made = torch.einsum("j,bjd->bd", row, full) + bias
        torch.testing.assert_close(error[step], (made - features[:, step]).square().mean(), rtol=1e-4, atol=0)
    assert error[0] == error[3] == 0


def test_a_saved_matrix_is_loaded_again_and_a_damaged_file_is_refused(tmp_path):
    gram = gram_of(torch.randn(3, 4, 5))
    gram.save(tmp_path / "gram.safetensors")
    assert torch.equal(GramMatrix.load(tmp_path / "gram.safetensors").matrix, gram.matrix)
    whole = (tmp_path / "gram.safetensors").read_bytes()
    (tmp_path / "gram.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="not a complete Gram matrix"):
        GramMatrix.load(tmp_path / "gram.safetensors")


def test_the_error_of_a_table_is_its_prediction_error_and_grows_with_a_limit():
    features = torch.randn(50, 8, 4, dtype=torch.float64).cumsum(1)
    gram, plan = gram_of(features), StepPlan(8, [0, 1, 2, 5])
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
    ],
    ids=str,
)
def test_a_file_without_a_gram_matrix_is_refused_and_named(tensors, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors is not a complete Gram matrix file"):
        GramMatrix.load(tmp_path / "odd.safetensors")
