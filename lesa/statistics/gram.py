"""Gram matrices: the inner products of the features of all steps, from which every linear forecaster follows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lesa.files import check_tensor, read_tensors, write_tensors
from lesa.files.tensors import damaged
from lesa.tables.plan import StepPlan
from lesa.tables.table import CoefficientTable
from lesa_kernels import gram_row

KIND = "Gram matrix"
RIDGE = 1e-6  # relative to the mean diagonal


class GramMatrix:
    """``G[i, j] = sum <feature_i, feature_j>`` over tokens, channels and samples, in float64 [steps + 1, steps + 1].

    The last row and column are those of the constant feature 1, so that a bias can be fitted. One matrix serves every
    plan: the best prediction of step s from the full steps A is ``G_AA^-1 G_As``, with the squared error
    ``G_ss - G_sA G_AA^-1 G_As``.

    Args:
        num_steps: steps of the schedule.

    Attributes:
        matrix: float64 [steps + 1, steps + 1].
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.matrix = torch.zeros(num_steps + 1, num_steps + 1, dtype=torch.float64)
        self._forget()

    def _forget(self) -> None:
        self._pending = torch.zeros_like(self.matrix)
        self._features: Tensor | None = None  # of the batch so far, [steps, elements]
        self._next_step = 0

    def update(self, step: int, feature: Tensor) -> None:
        """Add a feature of the current batch of samples; step 0 begins a batch, the last step adds it to the matrix.

        A batch without its last step changes nothing.

        Raises:
            ValueError: if steps do not come in order, shapes change within a batch, or the feature is not finite.
        """
        if step == 0:
            self._forget()
        if step != self._next_step:
            raise ValueError(f"step {step} does not follow step {self._next_step - 1}; step 0 begins a new batch")
        flat = feature.detach().flatten()
        if self._features is None:
            self._features = flat.new_empty(self.num_steps, flat.numel())
        if self._features.shape[1] != flat.numel():
            raise ValueError(
                f"the feature of step {step} has {flat.numel()} elements, step 0 had {self._features.shape[1]}"
            )
        self._features[step] = flat
        self._next_step += 1
        row = gram_row(self._features[: step + 1], self._features[step]).cpu()
        if not bool(row.isfinite().all()):
            self._forget()
            raise ValueError(f"the feature of step {step} holds NaN or infinity; the batch is not counted")
        self._pending[step, : step + 1] = row
        self._pending[: step + 1, step] = row
        self._pending[step, -1] = self._pending[-1, step] = flat.sum(dtype=torch.float64).cpu()
        if step == self.num_steps - 1:
            self._pending[-1, -1] = flat.numel()
            self.matrix = self.matrix + self._pending
            self._forget()

    @property
    def count(self) -> int:
        """Elements counted: samples x tokens x channels."""
        return int(self.matrix[-1, -1])

    def merge(self, other: "GramMatrix") -> None:
        """Add the counts of another matrix; a ValueError for another number of steps."""
        if other.num_steps != self.num_steps:
            raise ValueError(f"cannot merge matrices of {other.num_steps} and {self.num_steps} steps")
        self.matrix += other.matrix

    def solve(self, used: Sequence[int], targets: Sequence[int], *, ridge: float = RIDGE) -> Tensor:
        """Coefficients [targets, used] of the best combinations of steps ``used`` (``num_steps`` is the constant).

        Raises:
            ValueError: if nothing has been counted.
        """
        self._check_counted()
        index = torch.tensor(list(used))
        system = self.matrix[index[:, None], index]
        # scaled to a unit diagonal, so that the ridge means the same for the constant
        scale = system.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt().unsqueeze(-1)
        normal = system / scale.mT / scale + ridge * torch.eye(len(index), dtype=torch.float64)
        solution: Tensor = (torch.linalg.solve(normal, self.matrix[index][:, list(targets)] / scale) / scale).T
        return solution

    def error(self, plan: StepPlan, *, ridge: float = RIDGE) -> Tensor:
        """Mean squared error [steps] of the best prediction of each predicted step; zero at full steps."""
        self.check(plan)
        rest = torch.zeros(len(plan.predicted_steps), self.num_steps + 1, dtype=torch.float64)
        for row, step in enumerate(plan.predicted_steps):
            used = [f for f in plan.full_steps if f < step] + [self.num_steps]
            rest[row, used] = self.solve(used, [step], ridge=ridge)[0]
        return self._errors(plan, rest)

    def table_error(self, table: CoefficientTable) -> Tensor:
        """Mean squared error [steps] of what a table predicts of the calibration features; zero at full steps.

        Raises:
            ValueError: for a table of another number of steps, or an empty matrix.
        """
        plan = table.plan
        self.check(plan)
        rest = torch.zeros(len(table.bias), self.num_steps + 1, dtype=torch.float64)
        rest[:, list(plan.full_steps)], rest[:, -1] = table.coefficients, table.bias
        return self._errors(plan, rest)

    def relative_error(self, table: CoefficientTable) -> Tensor:
        """Relative error [steps] of a table: length of the error over length of the true feature; zero at full steps.

        Raises:
            ValueError: as :meth:`table_error`.
        """
        return (self.table_error(table) / (self.matrix.diagonal()[:-1] / self.count)).sqrt()

    def _errors(self, plan: StepPlan, rest: Tensor) -> Tensor:
        """Mean squared error [steps] of predictions [predicted, steps + 1]."""
        steps = list(plan.predicted_steps)
        rest[range(len(steps)), steps] = -1  # minus the true feature
        result = torch.zeros(self.num_steps, dtype=torch.float64)
        result[steps] = (rest @ self.matrix * rest).sum(1).clamp(min=0) / self.count
        return result

    def check(self, plan: StepPlan) -> None:
        """Raises a ValueError if a plan has another number of steps or nothing has been counted."""
        if plan.num_steps != self.num_steps:
            raise ValueError(f"the plan has {plan.num_steps} steps, this matrix {self.num_steps}")
        self._check_counted()

    def _check_counted(self) -> None:
        if self.count == 0:
            raise ValueError("this Gram matrix is empty: no batch has been completed")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            OSError: that names the file, if it cannot be written.
        """
        write_tensors(Path(path), self.tensors(), kind=KIND)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file."""
        return {"gram": self.matrix.contiguous()}

    @classmethod
    def load(cls, path: str | Path) -> "GramMatrix":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is damaged or something else; it names the file.
        """
        file = read_tensors(Path(path), kind=KIND)
        try:
            return cls.of(file.tensors)
        except ValueError as error:
            raise ValueError(damaged(file.path, KIND, error)) from error

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "GramMatrix":
        """The matrix whose :meth:`tensors` these are.

        Raises:
            ValueError: if they are those of no Gram matrix.
        """
        matrix = check_tensor(tensors, "gram", (None, None))
        if matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
            raise ValueError(f"gram is {list(matrix.shape)}, not [steps + 1, steps + 1]")
        scale = float(matrix.diagonal().max())
        if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * abs(scale)):
            raise ValueError("gram is not symmetric")
        # inner products make no negative square, but for what adding them up rounds
        if float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()) < -1e-6 * scale or matrix[-1, -1] < 0:
            raise ValueError("gram holds no inner products: a sum of squares would be negative")
        result = cls(len(matrix) - 1)
        result.matrix = matrix
        return result
